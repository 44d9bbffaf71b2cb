"""Subsets of rows: gathering, scattering, and subsets of subsets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from skipstone.core.ragged_store import EMPTY, RaggedStore
from skipstone.core.records import ActivationRecord, DepthRecord
from skipstone.core.row_subset import RowSubset
from skipstone.core.selection import WholeRows
from skipstone.core.tokens import PassMode, Tokens

KEPT = torch.tensor([0, 1, 1, 0, 1]).bool()
SLOT = torch.full((1, 1), 7)


def tokens(**more: object) -> Tokens:
    return Tokens(slot_BT=SLOT, position_BT=SLOT, mode=PassMode(per_row_gather=True), **more)


def test_rows_are_taken_out_and_put_back() -> None:
    rows, x = RowSubset.from_mask(KEPT), torch.randn(5, 1, 3)
    assert (rows.at, rows.index_R.tolist(), rows.total) == ((1, 2, 4), [1, 2, 4], 5)
    assert torch.equal(rows.gather(x), x[KEPT])
    assert torch.equal(rows.scatter(rows.gather(x)), x * KEPT[:, None, None])
    assert rows.scatter(rows.gather(x), float("nan"))[~KEPT].isnan().all()
    one = torch.randn(1, 4)
    assert rows.gather(one) is one, "rows that agree stay one"
    assert torch.equal(rows.scatter(one)[KEPT], one.expand(3, 4))


def test_a_single_row_is_not_copied() -> None:
    rows, x = RowSubset.from_mask(torch.tensor([False, False, True])), torch.randn(3, 2)
    assert rows.gather(x).data_ptr() == x[2].data_ptr()


def test_rows_of_rows() -> None:
    inner = RowSubset.from_mask(torch.tensor([True, False, True])).within(RowSubset.from_mask(KEPT))
    assert (inner.at, inner.index_R.tolist(), inner.total) == ((1, 4), [1, 4], 5)
    assert inner.within(None) is inner


@pytest.mark.parametrize("kept", [[0, 0, 0], [0, 1, 0], [1, 0, 1], [1, 1, 1], [1], [0]])
def test_decisions_on_single_tokens_select_rows(kept: list[int]) -> None:
    mask = torch.tensor(kept).bool()[:, None]
    part = tokens().select_kept(mask)
    assert part.is_all == all(kept)
    assert part.is_all or torch.equal(part.mask(), mask)
    assert part.is_empty == (not any(kept))
    assert isinstance(part, WholeRows) == (0 < sum(kept) < len(kept))
    x = torch.randn(len(kept), 1, 2)
    assert torch.equal(part.scatter(part.gather(x)), x * mask[..., None])


def test_whoever_does_not_ask_for_rows_gets_columns() -> None:
    """What is called with a selection may have arguments for every row."""
    single = replace(tokens(), mode=PassMode())
    assert not isinstance(single.select_kept(KEPT[:, None]), WholeRows)
    masked = replace(tokens(), mode=PassMode(executor="masked", per_row_gather=True))
    assert not isinstance(masked.select_kept(KEPT[:, None]), WholeRows)
    longer = torch.arange(2)[None]
    kept = replace(tokens(), slot_BT=longer).select_kept(KEPT[:, None].expand(5, 2))
    assert not isinstance(kept, WholeRows)


def test_selections_compose() -> None:
    """Rows of the cache through two selections, and a wish of an outer mechanism in the rows of an inner one."""
    whole = tokens(state={"s": torch.arange(5.0)[:, None]}, real_BT=torch.ones(5, 1).bool())
    outer = whole.select_kept(KEPT[:, None])
    inside = whole.select(outer)
    assert inside.rows is not None
    assert (inside.rows.at, inside.real_BT, inside.slot_BT.shape[0]) == ((1, 2, 4), None, 1)
    assert inside.state["s"].flatten().tolist() == [1, 2, 4]
    again = inside.select(inside.select_kept(torch.tensor([[True], [False], [True]])))
    assert again.rows is not None
    assert again.rows.at == (1, 4)
    wish = torch.tensor([1, 1, 0, 0, 1]).bool()[:, None]
    asked = whole.restrict_queries(wish).select(outer)
    assert torch.equal(outer.scatter(asked.queries.mask(), False), wish & KEPT[:, None])
    assert asked.query_tokens().rows.at == (1, 4)  # type: ignore[union-attr]


def test_records_are_lifted_out_of_rows() -> None:
    part, state = tokens().select_kept(KEPT[:, None]), {"s": torch.arange(5.0)[:, None]}
    assert isinstance(part, WholeRows)
    one = torch.ones(3, 1)
    outer = DepthRecord(one, one.bool(), one, one.bool(), one, {"s": -one}).lift(part, state)
    assert torch.equal(outer.kept_BT[:, 0], KEPT)
    assert torch.equal(outer.score_BT.isnan()[:, 0], ~KEPT)
    assert outer.carry["s"].flatten().tolist() == [0, -1, -1, 3, -1]
    lifted = ActivationRecord(torch.ones(3, 1, 4), one.bool()).lift(part, state)
    assert torch.equal(lifted.logits_BTA[:, 0, 0].isnan(), ~KEPT)


def test_a_store_writes_and_shows_some_rows() -> None:
    store, some = RaggedStore(), RowSubset.from_mask(torch.tensor([True, False, True]))
    store.append(torch.tensor([[0]]), None, some, value=torch.tensor([[[1.0]], [[3.0]]]))
    assert store.lengths == [1, 0, 1]
    store.append(torch.tensor([[1]]), None, value=torch.tensor([[[4.0]], [[5.0]], [[6.0]]]))
    assert store.view("value")[..., 0].tolist() == [[1, 4], [5, 0], [3, 6]]
    assert store.view("slot").tolist() == [[0, 1], [1, EMPTY], [0, 1]]
    assert store.even(some)
    assert not store.even()
    assert store.view("value", some)[..., 0].tolist() == [[1, 4], [3, 6]]
    middle = RowSubset.from_mask(torch.tensor([False, True, False]))
    assert store.view("value", middle).tolist() == [[[5]]], "as wide as these rows are, not as the longest of all"
    store.append(torch.tensor([[2]]), torch.tensor([[False], [True]]), some, value=torch.tensor([[[7.0]], [[8.0]]]))
    assert store.lengths == [2, 1, 3]
    assert store.last("value", some).flatten().tolist() == [4, 8]  # type: ignore[union-attr]
    assert store.last("value").flatten().tolist() == [4, 5, 8]  # type: ignore[union-attr]
    store.append(torch.tensor([[3]]), None, middle, value=torch.tensor([[[9.0]]]))
    assert store.lengths == [2, 2, 3]
    assert store.stored() == 7


def test_rows_that_become_equally_long_are_known_to_be() -> None:
    store = RaggedStore()
    for r in range(2):
        rows = RowSubset.from_mask(torch.arange(2) == r)
        store.append(torch.tensor([[r]]), None, rows, value=torch.ones(1, 1, 1))
    assert store.lengths is None
    assert store.even()
