"""Rows that keep different numbers of tokens, without the padding between them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skipstone.core.packing import LARGEST_SHARE, packed, pays
from skipstone.core.rows import LEAST_IDLE, rows_pay
from skipstone.core.tokens import Mode, Selection, Tokens

KEPT = torch.tensor([[1, 0, 1, 0, 1, 1], [0, 0, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0]]).bool()
T = KEPT.shape[1]


def tokens(**more: object) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, **more)  # type: ignore[arg-type]


def part() -> Selection:
    found = tokens().narrow(KEPT)
    assert found.packing is not None
    return found


def stream() -> Tensor:
    return torch.randn(*KEPT.shape, 4, generator=torch.Generator().manual_seed(0))


def test_packed_are_the_kept_tokens_of_all_rows_in_order() -> None:
    x, found = stream(), part()
    assert torch.equal(found.packing.gather(x)[0], x[KEPT])
    assert torch.equal(found.packing.pack(found.gather(x))[0], x[KEPT])


def test_back_in_columns_and_back_in_the_row() -> None:
    x, found = stream(), part()
    y_1ND = found.packing.gather(x)
    expected = torch.where(KEPT[..., None], x, 0.0)
    assert torch.equal(found.packing.scatter(y_1ND, T), expected)
    assert torch.equal(found.scatter(found.packing.unpack(y_1ND)), expected)
    assert not found.packing.unpack(y_1ND)[~found.valid_BK].any()


def test_rows_that_agree_are_repeated() -> None:
    found = part()
    row = torch.arange(float(found.width))[None]
    expected = row.expand(len(KEPT), -1)[found.valid_BK]
    assert torch.equal(found.packing.pack(row)[0], expected)


def test_gradients_reach_the_kept_tokens_only() -> None:
    x = stream().requires_grad_()
    found = part()
    found.packing.scatter(found.packing.gather(x) * 3, T).sum().backward()
    assert torch.equal(x.grad, 3 * KEPT[..., None].expand_as(x).float())


def test_tokens_pack_who_asks() -> None:
    x, wished = stream(), tokens().want(KEPT)
    asking = wished.asked()
    assert torch.equal(wished.gather_asked(x)[0], x[KEPT])
    assert torch.equal(wished.scatter_asked(wished.gather_asked(x)), torch.where(KEPT[..., None], x, 0.0))
    assert asking.packing is wished.wanted.packing
    plain = tokens()
    assert plain.pack(x) is x
    assert plain.unpack(x) is x
    assert plain.gather_asked(x) is x


def test_narrowed_twice_only_the_inner_packing_counts() -> None:
    outer = tokens().select(part())
    inner = outer.select(outer.narrow(outer.real_BT & (outer.slot_BT > 2)))
    again = replace(inner, wanted=None)
    assert torch.equal(again.pack(inner.slot_BT)[0], torch.tensor([4, 5, 3]))


@pytest.mark.parametrize(("count", "columns", "worth"), [(0, 10, False), (9, 10, True), (10, 10, False)])
def test_where_little_is_padding_nothing_is_packed(count: int, columns: int, worth: bool) -> None:
    assert pays(count, columns) == worth
    assert LARGEST_SHARE == 0.9
    index, valid = torch.arange(columns)[None], torch.arange(columns)[None] < count
    assert (packed(index, valid, count, columns) is not None) == worth


def test_a_known_width_is_not_packed() -> None:
    assert tokens().narrow(KEPT, width=4).packing is None


@pytest.mark.parametrize("share", [None, 0.125, 0.5, 1.0])
def test_on_a_processor_rows_are_always_left_out(share: float | None) -> None:
    assert rows_pay(64, share, torch.device("cpu"))


@pytest.mark.parametrize(
    ("rows", "share", "pay"),
    [(1, 0.125, True), (16, 0.125, True), (64, 0.125, False), (1, 0.75, True), (2, 0.75, False), (4, None, False)],
)
def test_elsewhere_figures_known_beforehand_decide(rows: int, share: float | None, pay: bool) -> None:
    """On the meta device nobody can look: that would raise."""
    assert rows_pay(rows, share, torch.device("meta")) == pay
    assert ((1 - (0.5 if share is None else share)) ** rows >= LEAST_IDLE) == pay
    slot = torch.zeros(1, 1, dtype=torch.long, device="meta")
    one = Tokens(slot_BT=slot, position_BT=slot, mode=Mode(by_row=True))
    kept = torch.ones(rows, 1, dtype=torch.bool, device="meta")
    if not pay:
        assert one.want(kept, share=share).wanted == Selection(valid_BK=kept, length=1)
    else:
        with pytest.raises((NotImplementedError, RuntimeError)):
            one.want(kept, share=share)
