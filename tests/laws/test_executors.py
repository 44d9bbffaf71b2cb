"""Law 8: computing only the kept tokens equals computing all and discarding: decisions, outputs, every gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from laws.builders import (
    DEPTH,
    EVERY_DECISION,
    LENGTH,
    NESTED,
    ORDERS,
    SITES,
    VARIANTS,
    Case,
    assert_close,
    assert_same_records,
    case,
    depth_records,
    entry,
    gradients,
    ids,
    lively,
)
from skipstone import SkipstoneForCausalLM

EVERY = ORDERS + SITES + NESTED + EVERY_DECISION + VARIANTS


def both(model: SkipstoneForCausalLM, tokens: Tensor, noise: bool = False, **options: object) -> None:
    """Run both executors and compare everything; with noise, both from the same seed."""
    results = []
    for executor in ("gathered", "masked"):
        model.zero_grad()
        torch.manual_seed(21)
        out = model(tokens, labels=tokens, noise=noise, executor=executor, output_records=True, **options)
        out.loss.backward()
        results.append((out, gradients(model)))
    (fast, quick), (slow, exact) = results
    assert_same_records(fast.records, slow.records)
    assert_close(fast.logits, slow.logits, "logits")
    assert_close(fast.loss, slow.loss, "loss")
    for name, gradient in exact.items():
        assert_close(quick[name], gradient, name, 1e-5 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("noise", [False, True], ids=["still", "noisy"])
@pytest.mark.parametrize("chosen", EVERY, ids=str)
def test_oracle(chosen: Case, noise: bool) -> None:
    """With noise, too: a random number belongs to its token, however many others are drawn before it."""
    both(lively(chosen).train(), ids(), routing="oracle", noise=noise)


@pytest.mark.parametrize("chosen", [c for c in EVERY if not c.oracle_only], ids=str)
def test_causal_with_padding(chosen: Case) -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :4], mask[2, 10:] = 0, 0
    both(lively(chosen).train(), ids(), routing="causal", noise=True, attention_mask=mask)


@pytest.mark.parametrize("chosen", ORDERS + NESTED, ids=str)
def test_oracle_with_documents_and_padding(chosen: Case) -> None:
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :2], mask[2, 12:] = 0, 0
    documents = torch.tensor([[0] * 6 + [1] * 9, [4] * 2 + [0] * 13, [0] * 5 + [3] * 5 + [1] * 5])
    both(lively(chosen).train(), ids(), routing="oracle", attention_mask=mask, document_ids=documents)


@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize("chosen", [c for c in NESTED if "soft" not in c.name], ids=str)
def test_odd_sizes(chosen: Case, length: int) -> None:
    model = lively(chosen)
    for rows in (1, 2):
        for routing in ("oracle", "causal"):
            tokens = ids(rows, length + 1)[:, :-1] if length > 1 else ids(rows, 1)
            results = [
                model(tokens, routing=routing, noise=False, executor=executor, output_records=True)
                for executor in ("gathered", "masked")
            ]
            assert_close(results[0].logits, results[1].logits, f"{rows} rows, {routing}")
            assert_same_records(results[0].records, results[1].records)


def extremes() -> Iterator[Any]:
    """Every decision at every place, keeping no token or all of them; each is quick at one place, with one of both."""
    for i, decision in enumerate(("topk", "random", "positional", "predictor")):
        for j, (capacity, kept) in enumerate(((0.05, "k=0"), (1.0, "k=T"))):
            for order, place in enumerate(("first", "middle", "last")):
                marks = () if order == i % 3 and j == i % 2 else pytest.mark.slow
                yield pytest.param(decision, order, capacity, id=f"{decision}-{place}-{kept}", marks=marks)


@pytest.mark.parametrize(("decision", "order", "capacity"), list(extremes()))
def test_none_and_all_kept(decision: str, order: int, capacity: float) -> None:
    entries = [entry(name) for name in DEPTH if name != "mixture_of_depths"]
    entries.insert(order, entry("mixture_of_depths", capacity=capacity, decision=decision))
    model = lively(case(*entries, activation="polyglu"))
    for noise in (False, True):
        both(model.train(), ids(), routing="oracle", noise=noise)
    out = model(ids(), routing="oracle", noise=False, output_records=True)
    for _, name, record in depth_records(out):
        if name == "mixture_of_depths":
            assert torch.equal(record.kept_BT, record.reached_BT) if capacity == 1 else not record.kept_BT.any()


@pytest.mark.parametrize("keep", ["none", "ragged"])
@pytest.mark.parametrize("chosen", [c for c in ORDERS + SITES + NESTED + VARIANTS if c.mechanisms], ids=str)
def test_forced(chosen: Case, keep: str) -> None:
    mask = torch.zeros(3, LENGTH, dtype=torch.bool)
    if keep == "ragged":  # nobody, every second, all
        mask[1, 1::2], mask[2] = True, True
    both(lively(chosen).train(), ids(), noise=True, routing={1: mask, 2: mask})


def test_what_is_not_kept_may_be_anything() -> None:
    """No number of a token that is left out reaches the result, nor, through 0 * inf, its gradient."""
    for name in (name for name in DEPTH if "mlp" in DEPTH[name].sites):
        model = lively(case(entry(name, on="mlp"))).train()
        mask = torch.rand(3, LENGTH) < 0.5
        weight = model.model.layers[1].mlp.down_proj.weight
        expected = model(ids(), routing={1: mask, 2: mask}).logits
        hook = model.model.layers[1].mlp.register_forward_hook(
            lambda module, inputs, output, mask=mask: (output[0].masked_fill(~mask[..., None], float("nan")), output[1])
        )
        got = model(ids(), routing={1: mask, 2: mask}, executor="masked").logits
        hook.remove()
        assert_close(got, expected, name)
        got.sum().backward()
        assert weight.grad.isfinite().all()
