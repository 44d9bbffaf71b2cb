"""Law 1: a mechanism set to the identity does not change the model, and can still learn."""

from __future__ import annotations

import pytest
import torch

from laws.builders import EVERY_DECISION, NESTED, ORDERS, SITES, VARIANTS, Case, assert_close, fresh, ids
from skipstone import SkipstoneForCausalLM
from skipstone.mechanisms.mixture_of_depths import WEIGHTS

CASES = [
    c for c in ORDERS + SITES + NESTED + VARIANTS if c.mechanisms or c.activation != "silu" or "neuron_groups" in c.name
]


def neutral_and_dense(chosen: Case) -> tuple[SkipstoneForCausalLM, SkipstoneForCausalLM]:
    routed = fresh(chosen)
    with torch.no_grad():
        for name, parameter in routed.named_parameters():
            if parameter.dim() > 1 and ".layers." in name:
                parameter.mul_(3)
    activation = "silu" if chosen.activation.startswith("polyglu") else chosen.activation
    more = tuple((option, value) for option, value in chosen.more if option != "neuron_groups")
    dense = fresh(Case("dense", (), activation, more))
    dense.load_state_dict(routed.state_dict(), strict=False)
    for mechanism in routed.routing_modules():
        mechanism.set_identity()
    return routed, dense


def check(chosen: Case, tolerance: float) -> None:
    routed, dense = neutral_and_dense(chosen)
    with torch.no_grad():
        expected = dense(ids()).logits
        for routing in ("oracle", "causal"):
            got = routed(ids(), routing=routing, noise=False).logits
            assert (got - expected).norm() <= tolerance * expected.norm(), routing
            assert_close(got, expected, routing, tolerance * 3)
    routed.train()(ids(), labels=ids(), noise=False).loss.backward()
    for layer in routed.model.layers:
        for mechanism in layer.routing_modules().values():
            norms = [p.grad.norm() for p in mechanism.parameters() if p.grad is not None]
            assert all(n.isfinite() for n in norms)
            learns = any(p.requires_grad for p in mechanism.parameters())
            if learns and getattr(mechanism, "weighting", "tanh") == "tanh":
                assert any(n > 0 for n in norms)


@pytest.mark.parametrize("chosen", CASES, ids=str)
def test_neutral_start(chosen: Case) -> None:
    only_depth_choice = chosen.activation == "silu" and all(
        dict(m)["name"] == "mixture_of_depths" for m in chosen.mechanisms
    )
    check(chosen, 2e-6 if only_depth_choice else 1e-3)


@pytest.mark.parametrize("chosen", EVERY_DECISION, ids=str)
def test_neutral_mixture_of_depths_is_exact_under_every_decision_and_weight(chosen: Case) -> None:
    check(chosen, 2e-6)


@pytest.mark.parametrize("chosen", [c for c in EVERY_DECISION if c.entries[0]["decision"] == "predictor"], ids=str)
def test_a_trained_mechanism_becomes_neutral_too(chosen: Case) -> None:
    routed, dense = neutral_and_dense(chosen)
    with torch.no_grad():
        for mechanism in routed.routing_modules():
            for parameter in mechanism.parameters():
                parameter.normal_()
            mechanism.set_identity()
        assert_close(routed(ids()).logits, dense(ids()).logits, tolerance=2e-6)
    assert dict(chosen.mechanisms[0])["weight"] in WEIGHTS
