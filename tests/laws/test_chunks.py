"""Law 3: prefill in chunks and decoding equal the full forward pass.

The cache can be cropped, reordered and repeated.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from laws.builders import CAUSAL, DEPTH, LENGTH, NESTED, ORDERS, Case, assert_close, case, entry, gradients, ids, lively
from skipstone import SkipstoneForCausalLM

SOME = [c for c in ORDERS + NESTED if c.mechanisms]


def splits(seed: int) -> list[tuple[int, int]]:
    """Random chunks of LENGTH tokens, several of them single tokens."""
    rng = random.Random(seed)
    cuts = sorted(rng.sample(range(1, LENGTH), rng.randint(2, LENGTH - 1)))
    return list(zip([0, *cuts], [*cuts, LENGTH], strict=True))


ONE_BY_ONE = [(i, i + 1) for i in range(LENGTH)]
PREFILL = [(0, 6), *((i, i + 1) for i in range(6, LENGTH))]


def in_chunks(
    model: SkipstoneForCausalLM, tokens: Tensor, parts: Sequence[tuple[int, int]], mask: Tensor | None = None
) -> Tensor:
    cache, logits = DynamicCache(config=model.config), []
    for start, end in parts:
        seen = None if mask is None else mask[:, :end]
        logits.append(model(tokens[:, start:end], attention_mask=seen, past_key_values=cache).logits)
        assert cache.get_seq_length() == end
    return torch.cat(logits, 1)


@pytest.mark.parametrize("chosen", CAUSAL, ids=str)
@torch.no_grad()
def test_chunks_equal_the_whole(chosen: Case) -> None:
    model = lively(chosen)
    whole = model(ids(), use_cache=False).logits
    assert_close(model(ids(), use_cache=True).logits, whole, "one prefill")
    for parts in (ONE_BY_ONE, splits(1)):
        assert_close(in_chunks(model, ids(), parts), whole, str(parts))
    assert_close(in_chunks(model, ids()[:1], PREFILL), whole[:1], "one row")


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_chunks_of_padded_rows_equal_the_whole(chosen: Case) -> None:
    model = lively(chosen)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :3], mask[2, :7] = 0, 0
    whole = model(ids(), attention_mask=mask, use_cache=False).logits
    for parts in (ONE_BY_ONE, splits(3)):
        assert_close(in_chunks(model, ids(), parts, mask)[mask.bool()], whole[mask.bool()], str(parts))


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_chunks_of_packed_rows_equal_the_whole(chosen: Case) -> None:
    model = lively(chosen)
    documents = torch.tensor([[0] * 6 + [1] * 9, [0] * 3 + [1] * 8 + [2] * 4, [0] * 15])
    positions = torch.tensor([[*range(6), *range(9)], [*range(3), *range(8), *range(4)], [*range(15)]])
    whole = model(ids(), document_ids=documents, use_cache=False).logits
    for parts in (PREFILL, splits(4)):
        cache, logits = DynamicCache(config=model.config), []
        for start, end in parts:
            part = {"document_ids": documents[:, start:end], "position_ids": positions[:, start:end]}
            logits.append(model(ids()[:, start:end], past_key_values=cache, **part).logits)
        assert_close(torch.cat(logits, 1), whole, str(parts))


@pytest.mark.parametrize("executor", ["gathered", "masked"])
@pytest.mark.parametrize("name", DEPTH)
@torch.no_grad()
def test_both_executors_share_the_cache(name: str, executor: str) -> None:
    model = lively(case(entry(name), activation="polyglu"))
    whole, cache = model(ids(), use_cache=False).logits, DynamicCache(config=model.config)
    parts = [model(ids()[:, a:b], past_key_values=cache, executor=executor).logits for a, b in PREFILL]
    assert_close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("chosen", ORDERS, ids=str)
@torch.no_grad()
def test_bfloat16_with_forced_decisions(chosen: Case) -> None:
    """In bf16 a score may fall on the other side of its threshold; with the decisions given, only rounding is left."""
    model = lively(chosen).bfloat16()
    masks = {i: torch.rand(3, LENGTH) < 0.5 for i in (1, 2) if model.model.layers[i].mechanisms}
    whole = model(ids(), routing=masks or "causal", use_cache=False).logits
    cache, logits = DynamicCache(config=model.config), []
    for a, b in PREFILL:
        routing = {i: mask[:, a:b] for i, mask in masks.items()} or "causal"
        logits.append(model(ids()[:, a:b], routing=routing, past_key_values=cache).logits)
    gap = (torch.cat(logits, 1).float() - whole.float()).norm() / whole.float().norm()
    assert gap < 0.02


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_cropped_cache_continues_as_if_never_longer(chosen: Case) -> None:
    model = lively(chosen)
    whole, other = model(ids(), use_cache=False).logits, ids(seed=9)
    for keep in (0, 5, 11):
        cache = DynamicCache(config=model.config)
        model(torch.cat((ids()[:, :keep], other[:, keep:]), 1)[:, :9], past_key_values=cache)
        model(other[:, 9:13], past_key_values=cache)
        if keep == 11:
            cache = DynamicCache(config=model.config)
            model(torch.cat((ids()[:, :keep], other[:, keep:]), 1), past_key_values=cache)
        cache.crop(keep - cache.get_seq_length())
        cache.crop(0)  # nothing to remove
        assert cache.get_seq_length() == keep
        logits = [model(ids()[:, a:b], past_key_values=cache).logits for a, b in [(keep, 12), (12, 13), (13, LENGTH)]]
        assert_close(torch.cat(logits, 1), whole[:, keep:], f"crop({keep})")


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_cache_rows_can_be_reordered_selected_and_repeated(chosen: Case) -> None:
    model, rows = lively(chosen), torch.tensor([2, 0, 0])
    whole = model(ids(), use_cache=False).logits
    for act, expected in {
        "reorder": rows,
        "select": torch.tensor([2, 1]),
        "repeat": torch.tensor([0, 0, 1, 1, 2, 2]),
    }.items():
        cache = DynamicCache(config=model.config)
        model(ids()[:, :8], past_key_values=cache)
        model(ids()[:, 8:9], past_key_values=cache)
        if act == "reorder":
            cache.reorder_cache(rows)
        elif act == "select":
            cache.batch_select_indices(expected)
        else:
            cache.batch_repeat_interleave(2)
        parts = [(9, 10), (10, 13), (13, LENGTH)]
        logits = [model(ids()[expected, a:b], past_key_values=cache).logits for a, b in parts]
        assert_close(torch.cat(logits, 1), whole[expected, 9:], act)


@pytest.mark.parametrize("chosen", [c for c in SOME if len(c.mechanisms) == 3], ids=str)
def test_gradients_flow_through_the_cache(chosen: Case) -> None:
    """What later chunks save for the backward pass must not be overwritten by those after them."""
    model, results = lively(chosen), []
    for parts in ([(0, LENGTH)], [(0, 5), (5, 9), (9, 10), (10, LENGTH)]):
        model.zero_grad()
        in_chunks(model, ids(), parts).square().sum().backward()
        results.append(gradients(model))
    for name, gradient in results[0].items():
        assert_close(results[1][name], gradient, name, 1e-5 * max(1.0, gradient.abs().max().item()))


def test_a_cache_outlives_inference_mode_and_gradients() -> None:
    model = lively(case(*map(entry, DEPTH), activation="polyglu"))
    whole, cache = model(ids(), use_cache=False).logits.detach(), DynamicCache(config=model.config)
    with torch.inference_mode():
        logits = [model(ids()[:, :6], past_key_values=cache).logits]
    logits.append(model(ids()[:, 6:9], past_key_values=cache).logits)
    with torch.no_grad():
        logits.append(model(ids()[:, 9:10], past_key_values=cache).logits)
    with torch.inference_mode():
        logits.append(model(ids()[:, 10:], past_key_values=cache).logits)
    assert_close(torch.cat([x.detach().clone() for x in logits], 1), whole)


@torch.no_grad()
def test_skipped_tokens_are_not_stored() -> None:
    model = lively(case(entry("mixture_of_depths"), activation="polyglu"))
    out = model(ids(), use_cache=True, output_records=True)
    for layer, records in zip(out.past_key_values.layers, out.records, strict=True):
        kept = records["mixture_of_depths"].kept_BT.sum().item() if "mixture_of_depths" in records else ids().numel()
        assert layer.kv.stored() == layer.stores["polyglu"].stored() == kept
