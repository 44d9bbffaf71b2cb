"""FLOP counts: attention is never 0, no operation is unknown, and host syncs happen only where documented."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from transformers.cache_utils import DynamicCache

from laws.builders import DECIDED, LENGTH, NESTED, ORDERS, ROUTED, ROWS, SITES, Case, case, entry, fresh, ids, lively
from skipstone.measure.flops import FREE, TABLE, count_flops, count_host_syncs, is_free

B, H, GROUPS, T, E = 2, 4, 2, 7, 8
WITH_POLYGLU = [c for c in ORDERS if c.activation == "polyglu"]
MASK = torch.ones(T, T + 3, dtype=torch.bool)
SINGLE = [c for c in ORDERS + SITES if len(c.mechanisms) == 1]
KNOWN = [c for c in SINGLE if c.activation == "polyglu"] + NESTED + DECIDED


def attention_inputs(heads: int = H) -> Iterator[torch.Tensor]:
    yield torch.randn(B, H, T, E, requires_grad=True)
    for _ in range(2):
        yield torch.randn(B, heads, T + 3, E, requires_grad=True)


@pytest.mark.parametrize("heads", [H, GROUPS])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_causal": True}, {"attn_mask": MASK}, {"dropout_p": 0.5}],
    ids=str,
)
def test_attention_counts_two_products_forward_and_four_backward(options: dict[str, Any], heads: int) -> None:
    """By whatever kernel, causal or not: a fused one that computes scores again in its backward counts no more."""
    query, key, value = attention_inputs(heads)
    product = 2 * B * H * E * T * (T + 3)
    grouped = {"enable_gqa": True} if heads != H else {}

    def forward() -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, **options, **grouped)

    assert count_flops(forward).total == 2 * product
    assert count_flops(lambda: forward().sum().backward()).total == 6 * product


def test_every_fused_attention_has_a_formula() -> None:
    names = [n for n in dir(torch.ops.aten) if n.startswith("_scaled_dot_product") and "_math" not in n]
    assert "_scaled_dot_product_flash_attention_for_cpu_backward" in names
    assert [n for n in names if getattr(torch.ops.aten, n) not in TABLE] == []


@pytest.mark.parametrize("chosen", [case(), case(entry("token_selective"))], ids=str)
def test_a_fused_kernel_counts_like_the_plain_formula(chosen: Case) -> None:
    tokens = ids(1)

    def total(implementation: str) -> int:
        model = fresh(chosen, attn_implementation=implementation).train()
        count = count_flops(lambda: model(tokens, labels=tokens, noise=False).loss.backward())
        assert count.by_kind["attention_score"] > 0
        return count.total

    assert total("sdpa") == total("eager")


def test_no_operation_is_both_counted_and_free() -> None:
    packets = [op for op in TABLE if isinstance(op, torch._ops.OpOverloadPacket)]
    counted = [getattr(op, name) for op in packets for name in op.overloads()]
    assert len(counted) > len(TABLE) // 2
    assert [str(op) for op in counted if is_free(op)] == []


def test_free_operations_exist_and_need_their_line() -> None:
    packets = [getattr(torch.ops.aten, name) for name in sorted(FREE)]
    by_tag = {torch.Tag.pointwise, torch.Tag.reduction, torch.Tag.view_copy}
    assert [str(p) for p in packets if all(by_tag & set(getattr(p, o).tags) for o in p.overloads())] == []


def test_an_operation_that_nobody_thought_of_is_reported() -> None:
    square = torch.eye(3)
    count = count_flops(lambda: torch.linalg.inv_ex(square)[0] @ square)
    assert count.unknown == ("aten.linalg_inv_ex.default",)
    assert count.total == 2 * 27


QUICK = 12  # one case in so many; the laws of cost count on others


@pytest.mark.parametrize(
    "chosen",
    [
        c if i % QUICK == 0 and len(c.entries) < 5 else pytest.param(c, marks=pytest.mark.slow)
        for i, c in enumerate(KNOWN)
    ],
    ids=str,
)
def test_every_operation_of_every_mechanism_is_known(chosen: Case) -> None:
    """In training and in causal passes; with padding, documents and a ragged cache."""
    model, tokens = lively(chosen), ids()
    mask = torch.ones(ROWS, LENGTH, dtype=torch.long)
    mask[1, :5] = 0
    documents = torch.arange(LENGTH).expand(ROWS, -1) // 6

    def run() -> None:
        model.train()
        model(tokens, attention_mask=mask, labels=tokens).loss.backward()
        model(tokens, document_ids=documents, labels=tokens).loss.backward()
        model.eval()
        if not chosen.oracle_only:
            model(tokens, attention_mask=mask, document_ids=documents)
            cache = DynamicCache(config=model.config)
            for part in tokens.split(LENGTH // 2, dim=1):
                model(part, past_key_values=cache)

    assert count_flops(run).unknown == ()


@torch.inference_mode()
def test_inference_mode_counts_the_same() -> None:
    model, tokens = lively(NESTED[0]), ids()
    count = count_flops(lambda: model(tokens))
    with torch.inference_mode(False), torch.no_grad():
        usual = count_flops(lambda: model(tokens))
    assert count == usual


@pytest.mark.slow
def test_repeated_forward_of_checkpointing_is_executed() -> None:
    tokens = ids()

    def total(checkpointing: bool) -> Counter[str]:
        model = lively(NESTED[1]).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        count = count_flops(lambda: model(tokens, labels=tokens, noise=False).loss.backward())
        assert count.unknown == ()
        return Counter(count.by_kind)

    plain, repeated = total(False), total(True)
    blocks = sum(plain.values()) - plain["backward"] - plain["head"]
    extra = repeated - plain
    assert list(extra) == ["backward"]
    assert 0.8 * blocks < extra["backward"] <= blocks  # torch stops when it has what the backward pass needs


def syncs(fn: Callable[[], Any]) -> int:
    return sum(count_host_syncs(fn).values())


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda x: x.sum().item(), 1),
        (lambda x: bool((x > 0).any()), 1),
        (lambda x: x.nonzero(), 1),
        (lambda x: x[x > 0], 1),
        (lambda x: x.index_put((x > 0,), torch.zeros(())), 1),
        (lambda x: torch.equal(x, x), 1),
        (lambda x: x.repeat_interleave(torch.ones(3, dtype=torch.long)), 1),
        (lambda x: x[torch.tensor([0, 1])] + x.sum(), 0),
        (lambda x: x.to("cpu", torch.float64).sort(), 0),
    ],
)
def test_what_makes_the_host_wait(fn: Callable[[torch.Tensor], Any], expected: int) -> None:
    assert syncs(lambda: fn(torch.arange(3.0))) == expected
    with torch.inference_mode():
        assert syncs(lambda: fn(torch.arange(3.0))) == expected


@pytest.mark.parametrize("chosen", WITH_POLYGLU + SITES, ids=str)
def test_training_never_waits(chosen: Case) -> None:
    """But for mechanisms that say so, because how many tokens or rows they keep follows from the data."""
    model, tokens = lively(chosen).train(), ids()
    waiting = sum(
        mechanism.waits_in_training for block in model.model.layers for mechanism in block.mechanisms.values()
    )
    found = syncs(lambda: model(tokens, labels=tokens).loss.backward())
    assert found <= 4 * waiting if waiting else found == 0


@pytest.mark.parametrize("rows", [1, ROWS])
@pytest.mark.parametrize("chosen", SINGLE, ids=str)
@torch.no_grad()
def test_causal_pass_waits_once_a_routed_block(chosen: Case, rows: int) -> None:
    model, tokens = lively(chosen), ids(rows)
    mechanisms = [mechanism for block in model.model.layers for mechanism in block.mechanisms.values()]
    once, more = (sum(getattr(m, name) for m in mechanisms) for name in ("skips", "waits_in_training"))
    assert once <= syncs(lambda: model(tokens, use_cache=False)) <= once + min(once, more)


@pytest.mark.parametrize("chosen", WITH_POLYGLU, ids=str)
@torch.no_grad()
def test_nested_mechanisms_wait_once_each_and_once_for_a_wish_that_is_gathered(chosen: Case) -> None:
    model, tokens = lively(chosen), ids()
    names = [e["name"] for e in chosen.entries]
    wish = "mixture_of_depths" in names[1:]  # tokens wanted by a gate outside, in the coordinates of those kept
    assert syncs(lambda: model(tokens, use_cache=False)) <= len(ROUTED) * (len(names) + wish)


@pytest.mark.parametrize("chosen", SINGLE, ids=str)
@torch.no_grad()
def test_a_ragged_store_waits_twice(chosen: Case) -> None:
    """For its new width, and for the places of the real tokens; a row alone is never ragged."""
    model = lively(chosen)
    stores = 1 + (chosen.activation == "polyglu")
    for rows, ragged in ((1, 0), (ROWS, 2 * stores)):
        cache, tokens = DynamicCache(config=model.config), ids(rows)
        found = syncs(lambda tokens=tokens, cache=cache: model(tokens, past_key_values=cache))
        assert found <= len(ROUTED) * (1 + ragged)


def test_what_a_moving_threshold_costs_in_training() -> None:
    """It keeps a number of tokens that only the scores tell: the one decision that waits while training."""
    tokens = ids()
    for decision, expected in (("ema_threshold", len(ROUTED)), ("predictor", 0), ("random", 0), ("positional", 0)):
        model = lively(case(entry("mixture_of_depths", decision=decision))).train()
        assert syncs(lambda model=model: model(tokens, labels=tokens).loss.backward()) == expected
