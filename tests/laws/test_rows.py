"""Law 8: decoding where rows decide differently computes only the rows that keep their token, without other changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from laws.builders import (
    DEPTH,
    NESTED,
    ORDERS,
    ROUTED,
    SITES,
    Case,
    assert_close,
    assert_same_records,
    case,
    ids,
    lively,
)
from skipstone import SkipstoneForCausalLM
from skipstone.core import tokens as tokens_module
from skipstone.core.records import DepthRecord
from skipstone.measure.flops import count_flops, count_host_syncs
from skipstone.model.cost import kept_from_records
from skipstone.nn import attention

PROMPT, STEPS = 6, 7
SINGLE = [c for c in ORDERS + SITES if len(c.mechanisms) == 1]
ONE = [c for c in ORDERS if len(c.mechanisms) == 1 and c.activation == "polyglu"]
THREE = [c for c in ORDERS if len(c.mechanisms) == 3 and c.activation == "polyglu"]


def random_masks(rows: int, length: int, generator: torch.Generator) -> dict[int, Tensor]:
    """Half of the tokens in routed blocks; a row now and then keeps all or nothing."""
    share = torch.rand(rows, 1, generator=generator).mul(1.6).sub(0.3)
    return {i: torch.rand(rows, length, generator=generator) < share for i in ROUTED}


def decoded(model: SkipstoneForCausalLM, rows: int, executor: str, forced: bool) -> tuple[list[Any], DynamicCache]:
    """A padded prompt and single tokens after it, by one executor."""
    generator, cache, outs = torch.Generator().manual_seed(rows), DynamicCache(config=model.config), []
    tokens, mask = ids(rows, PROMPT + STEPS), torch.ones(rows, PROMPT + STEPS, dtype=torch.long)
    mask[0, : rows - 1] = 0
    for start, end in [(0, PROMPT), *((t, t + 1) for t in range(PROMPT, PROMPT + STEPS))]:
        masks = {
            i: m for i, m in random_masks(rows, end - start, generator).items() if model.model.layers[i].mechanisms
        }
        outs.append(
            model(
                tokens[:, start:end],
                attention_mask=mask[:, :end],
                past_key_values=cache,
                routing=masks if forced and masks else "causal",
                executor=executor,
                output_records=True,
            )
        )
    return outs, cache


@pytest.mark.parametrize("forced", [True, False], ids=["forced", "own"])
@pytest.mark.parametrize("chosen", [c for c in (*SINGLE, *THREE, *NESTED) if c.mechanisms], ids=str)
@torch.no_grad()
def test_rows_that_are_computed_alone_equal_all_that_is_thrown_away(chosen: Case, forced: bool) -> None:
    """Logits, records and everything that the cache holds, at every number of rows."""
    model = lively(chosen)
    for rows in (1, 2, 3, 4, 5, 6) if chosen in ONE else (4,):
        (fast, held), (slow, expected) = (decoded(model, rows, executor, forced) for executor in ("gathered", "masked"))
        for one, other in zip(fast[1:], slow[1:], strict=True):
            assert_close(one.logits, other.logits, "logits")
            assert_same_records(one.records, other.records)
        assert_same_caches(held, expected)


@pytest.mark.parametrize("way", ["all attend", "all computed"])
@pytest.mark.parametrize("chosen", [*SINGLE, *THREE], ids=str)
@torch.no_grad()
def test_how_rows_are_computed_changes_nothing(chosen: Case, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that do not ask may attend with the others, and blocks with few rows to skip compute all."""
    model = lively(chosen)
    slow, expected = decoded(model, 4, "masked", forced=True)
    if way == "all attend":
        monkeypatch.setattr(attention, "LEAST_COPY", 0)
    else:
        monkeypatch.setattr(tokens_module, "rows_pay", lambda *given: False)
    fast, held = decoded(model, 4, "gathered", forced=True)
    for one, other in zip(fast, slow, strict=True):
        assert_close(one.logits, other.logits, "logits")
        assert_same_records(one.records, other.records)
    assert_same_caches(held, expected)


def assert_same_caches(one: Any, other: Any) -> None:
    for i, (mine, yours) in enumerate(zip(one.layers, other.layers, strict=True)):
        assert mine.stores.keys() <= yours.stores.keys()
        for name in ("kv", *mine.stores):
            a, b = (layer.kv if name == "kv" else layer.stores[name] for layer in (mine, yours))
            assert (a.width, a.lengths, a.stored()) == (b.width, b.lengths, b.stored()), f"layer {i} {name}"
            used = b.view("slot") < 2**62
            assert torch.equal(a.view("slot"), b.view("slot"))
            for entry in a.entries:
                assert_close(a.view(entry)[used], b.view(entry)[used], f"layer {i} {name} {entry}")


@pytest.mark.parametrize("chosen", THREE, ids=str)
def test_gradients_of_steps_equal_the_masked_executor(chosen: Case) -> None:
    model, found = lively(chosen), []
    for executor in ("gathered", "masked"):
        model.zero_grad()
        outs, _ = decoded(model, 4, executor, forced=True)
        sum(out.logits.square().mean() for out in outs).backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    for name, gradient in found[1].items():
        mine = found[0].get(name, torch.zeros_like(gradient))
        assert_close(mine, gradient, name, 1e-5 * max(1.0, gradient.abs().max().item()))


@pytest.mark.parametrize("chosen", [*SINGLE, *NESTED, case()], ids=str)
@torch.no_grad()
def test_a_step_executes_its_rows_and_nothing_else(chosen: Case) -> None:
    """Law 7 in batches: the FLOPs counted are those of the rows that keep their token."""
    model, rows = lively(chosen), 5
    tokens, cache = ids(rows, PROMPT + STEPS), DynamicCache(config=model.config)
    model(tokens[:, :PROMPT], past_key_values=cache)
    for t in range(PROMPT, PROMPT + STEPS // 2 + 1):
        outs: list[Any] = []
        step = {"past_key_values": cache, "output_records": True}
        counted = count_flops(lambda t=t, outs=outs, step=step: outs.append(model(tokens[:, t : t + 1], **step)))
        kept = kept_from_records(model, outs[0].records)
        cost = model.cost(1, past=t, batch=rows, kept=kept, stored=keys_seen(model, outs[0].records, cache))
        promised = {kind: value for kind, value in vars(cost.forward).items() if value}
        assert counted.unknown == ()
        assert dict(counted.by_kind) == pytest.approx(promised, rel=1e-9)


def keys_seen(model: SkipstoneForCausalLM, records: Any, cache: Any) -> dict[int, int]:
    """By layer, the keys before this token that the longest row had whose attention was asked."""
    seen = {}
    for i, (block, decided) in enumerate(zip(model.model.layers, records, strict=True)):
        asks = torch.ones(len(next(iter(decided.values())).reached_BT) if decided else 1, dtype=torch.bool)
        for name in (*block.sites["segment"], *block.sites["block"], *block.sites["attention"]):
            assert isinstance(decided[name], DepthRecord)
            asks = asks & decided[name].kept_BT[:, 0]
        store = cache.layers[i].kv
        lengths = store.row_lengths(len(asks), torch.device("cpu"))
        seen[i] = int(lengths[asks].max()) - 1 if asks.any() else 0
    return seen


@pytest.mark.parametrize(
    "chosen", [c for c in SINGLE if c.mechanisms[0] in [m for c in ORDERS for m in c.mechanisms]], ids=str
)
@torch.no_grad()
def test_a_step_waits_as_often_as_its_mechanisms_declare(chosen: Case) -> None:
    """The cache counts its rows on the host, so that rows of their own length cost no further look."""
    model, cache = lively(chosen), DynamicCache(config=lively(chosen).config)
    syncs = sum(mechanism.host_syncs for block in model.model.layers for mechanism in block.mechanisms.values())
    tokens = ids(4, PROMPT + STEPS)
    model(tokens[:, :PROMPT], past_key_values=cache)
    for t in range(PROMPT, PROMPT + STEPS):
        found = count_host_syncs(lambda t=t: model(tokens[:, t : t + 1], past_key_values=cache))
        assert found.total() == syncs


def test_every_mechanism_has_rows_that_disagree() -> None:
    """Or else nothing above would test what it says."""
    for name in DEPTH:
        model = lively(next(c for c in SINGLE if dict(c.mechanisms[0])["name"] == name))
        with torch.no_grad():
            outs, _ = decoded(model, 6, "gathered", forced=False)
        kept = torch.cat([out.records[1][name].kept_BT for out in outs[1:]], 1).sum(0)
        assert ((kept > 0) & (kept < 6)).any() == model.model.layers[1].mechanisms[name].skips
