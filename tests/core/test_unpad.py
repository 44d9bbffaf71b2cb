"""Unpadding of rows that keep different numbers of tokens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skipstone.core.row_subset import LEAST_IDLE, rows_pay
from skipstone.core.selection import InPlace, Selection
from skipstone.core.tokens import PassMode, Tokens
from skipstone.core.unpad import LARGEST_SHARE, pays, unpadding_of

KEPT = torch.tensor([[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
T = KEPT.shape[1]


def tokens(**more: object) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, **more)  # type: ignore[arg-type]


def part() -> Selection:
    found = tokens().select_kept(KEPT)
    assert found.unpadding is not None
    return found


def stream() -> Tensor:
    return torch.randn(*KEPT.shape, 4, generator=torch.Generator().manual_seed(0))


def test_packed_are_the_kept_tokens_of_all_rows_in_order() -> None:
    x, found = stream(), part()
    assert torch.equal(found.unpadding.gather(x)[0], x[KEPT])
    assert torch.equal(found.unpadding.unpad(found.gather(x))[0], x[KEPT])


def test_back_in_columns_and_back_in_the_row() -> None:
    x, found = stream(), part()
    y_1ND = found.unpadding.gather(x)
    expected = torch.where(KEPT[..., None], x, 0.0)
    assert torch.equal(found.unpadding.scatter(y_1ND, T), expected)
    assert torch.equal(found.scatter(found.unpadding.pad(y_1ND)), expected)
    assert not found.unpadding.pad(y_1ND)[~found.valid_BK].any()


def test_rows_that_agree_are_repeated() -> None:
    found = part()
    row = torch.arange(float(found.width))[None]
    expected = row.expand(len(KEPT), -1)[found.valid_BK]
    assert torch.equal(found.unpadding.unpad(row)[0], expected)


def test_gradients_reach_the_kept_tokens_only() -> None:
    x = stream().requires_grad_()
    found = part()
    found.unpadding.scatter(found.unpadding.gather(x) * 3, T).sum().backward()
    assert torch.equal(x.grad, 3 * KEPT[..., None].expand_as(x).float())


def test_tokens_pack_who_asks() -> None:
    x, wished = stream(), tokens().restrict_queries(KEPT)
    asking = wished.query_tokens()
    assert torch.equal(wished.gather_queries(x)[0], x[KEPT])
    assert torch.equal(wished.scatter_queries(wished.gather_queries(x)), torch.where(KEPT[..., None], x, 0.0))
    assert asking.unpadding is wished.queries.unpadding
    plain = tokens()
    assert plain.unpad(x) is x
    assert plain.pad(x) is x
    assert plain.gather_queries(x) is x


def test_narrowed_twice_only_the_inner_packing_counts() -> None:
    outer = tokens().select(part())
    inner = outer.select(outer.select_kept(outer.real_BT & (outer.slot_BT > 2)))
    again = replace(inner, queries=None)
    assert torch.equal(again.unpad(inner.slot_BT)[0], torch.tensor([4, 5, 3]))


@pytest.mark.parametrize(("count", "columns", "worth"), [(0, 10, False), (9, 10, True), (10, 10, False)])
def test_where_little_is_padding_nothing_is_packed(count: int, columns: int, worth: bool) -> None:
    assert pays(count, columns) == worth
    assert LARGEST_SHARE == 0.9
    index, valid = torch.arange(columns)[None], torch.arange(columns)[None] < count
    assert (unpadding_of(index, valid, count, columns) is not None) == worth


def test_a_known_width_is_not_packed() -> None:
    assert tokens().select_kept(KEPT, width=4).unpadding is None


@pytest.mark.parametrize("share", [None, 0.125, 0.5, 1.0])
def test_on_a_processor_rows_are_always_left_out(share: float | None) -> None:
    assert rows_pay(64, share, torch.device("cpu"))


@pytest.mark.parametrize(
    ("rows", "share", "pay"),
    [(1, 0.125, True), (16, 0.125, True), (64, 0.125, False), (1, 0.75, True), (2, 0.75, False), (4, None, False)],
)
def test_elsewhere_figures_known_beforehand_decide(rows: int, share: float | None, pay: bool) -> None:
    """On the meta device, reading a value would raise."""
    assert rows_pay(rows, share, torch.device("meta")) == pay
    assert ((1 - (0.5 if share is None else share)) ** rows >= LEAST_IDLE) == pay
    slot = torch.zeros(1, 1, dtype=torch.long, device="meta")
    one = Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(per_row_gather=True))
    kept = torch.ones(rows, 1, dtype=torch.bool, device="meta")
    if not pay:
        assert one.restrict_queries(kept, share=share).queries == InPlace(kept)
    else:
        with pytest.raises((NotImplementedError, RuntimeError)):
            one.restrict_queries(kept, share=share)
