"""Law 5: with default initialisation, gradients are finite, not zero, and reach the router."""

from __future__ import annotations

import math

import pytest
import torch

from laws.builders import EVERY_DECISION, NESTED, ORDERS, SITES, VARIANTS, Case, fresh, ids
from skipstone import SkipstoneForCausalLM
from skipstone.mechanisms.decisions import DECISIONS

START = ORDERS + SITES + NESTED
TRAIN_ROUTERS = {name for name, decision in DECISIONS.items() if decision.trains_router}


def step(model: SkipstoneForCausalLM) -> dict[str, float]:
    """Norm of the gradient of each parameter that is to learn, NaN where there is none."""
    model.train()(ids(), labels=ids()).loss.backward()
    learns = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    return {n: float("nan") if grad is None else grad.norm().item() for n, grad in learns.items()}


@pytest.mark.parametrize("chosen", START, ids=str)
def test_every_parameter_learns_from_the_first_step(chosen: Case) -> None:
    """Or from one of the first few, where the rows of a step may all be drawn to leave a block out."""
    model = fresh(chosen)
    dead = set(dict(model.named_parameters()))
    for _ in range(32):  # weights stay: what is not drawn is the same each time
        norms = step(model)
        assert all(norm < float("inf") or math.isnan(norm) for norm in norms.values())
        dead = {name for name in dead if name in norms and not norms[name] > 0}
        model.zero_grad()
        if not dead:
            break
    assert not dead


@pytest.mark.parametrize("chosen", EVERY_DECISION, ids=str)
def test_every_decision_and_weight(chosen: Case) -> None:
    """A router learns unless nothing of it is executed: weight none, and neither guidance nor the decision train it.

    The weight 1 + a tanh(r) starts at a = 0: then a learns in the first step, and the router from the second on.
    """
    options, model = chosen.entries[0], fresh(chosen)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    first = step(model)
    optimizer.step()
    optimizer.zero_grad()
    second = step(model)
    mechanism = model.model.layers[1].mechanisms["mixture_of_depths"]
    idle = options["weight"] == "none" and not mechanism.decision.trains_router and not mechanism.config.guidance
    for norms in (first, second):
        dead = {name for name, norm in norms.items() if not 0 < norm < float("inf")}
        routers = {name for name in norms if name.endswith("router.weight")}
        late = options["weight"] == "tanh" and options["decision"] not in TRAIN_ROUTERS and norms is first
        assert dead == (routers if idle or late else set())


@pytest.mark.parametrize("chosen", VARIANTS, ids=str)
def test_every_variant_learns_from_the_second_step(chosen: Case) -> None:
    """What starts at zero to be neutral (tanh weights, skip paths) lets parameters before it learn a step later."""
    model = fresh(chosen)
    for mechanism in model.routing_modules():
        mechanism.advance(0.25, None)  # some warm-ups would still keep everybody
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    late = {name for name, norm in step(model).items() if not 0 < norm < float("inf")}
    assert all(name.endswith(("down_weight", "router.weight")) for name in late)
    optimizer.step()
    optimizer.zero_grad()
    assert not {name for name, norm in step(model).items() if not 0 < norm < float("inf")}


@pytest.mark.parametrize("chosen", ORDERS, ids=str)
def test_autocast_keeps_gradients_finite_and_scores_in_fp32(chosen: Case) -> None:
    model = fresh(chosen).train()
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids(), labels=ids(), output_records=True)
    out.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    for records in out.records:
        for record in records.values():
            assert record[0].dtype == torch.float32
