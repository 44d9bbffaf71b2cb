"""Selections and query restrictions compose in every executor, also where rows are equal."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, DepthRecord
from skipstone.core.selection import EVERYONE, Selection
from skipstone.core.tokens import Executor, PassMode, Tokens

KEPT = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
WISH = torch.tensor([[1, 1, 0, 1, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]]).bool()


def tokens(executor: Executor = "gathered", real: Tensor | None = None, length: int = 5) -> Tokens:
    slot = torch.arange(length)[None]
    return Tokens(slot_BT=slot, position_BT=slot + 10, real_BT=real, mode=PassMode(executor=executor))


def mask_of(selection: Selection) -> list[list[bool]]:
    return selection.mask().tolist()


@pytest.mark.parametrize("executor", ["gathered", "masked"])
def test_a_selection_is_its_mask(executor: Executor) -> None:
    part = tokens(executor).select_kept(KEPT)
    assert part.width == (3 if executor == "gathered" else 5)
    assert torch.equal(part.mask(), KEPT)
    x = torch.randn(3, 5, 2)
    assert torch.equal(part.scatter(part.gather(x)), x * KEPT[..., None])
    inner = tokens(executor).select(part)
    real = torch.ones(1, 1).bool() if inner.real_BT is None else inner.real_BT
    for b in range(3):
        assert inner.slot_BT.expand(3, -1)[b][real.expand(3, -1)[b]].tolist() == KEPT[b].nonzero().flatten().tolist()


@pytest.mark.parametrize("executor", ["gathered", "masked"])
def test_wishes_intersect_and_survive_a_narrowing(executor: Executor) -> None:
    whole = tokens(executor)
    assert mask_of(whole.restrict_queries(WISH).restrict_queries(KEPT).queries) == (WISH & KEPT).tolist()
    part = whole.select_kept(KEPT)
    inner = whole.restrict_queries(WISH).select(part)
    back = part.scatter(inner.queries.mask())
    assert torch.equal(back, WISH & KEPT)


@pytest.mark.parametrize("length", [1, 5])
@pytest.mark.parametrize("everyone", [True, False])
def test_wishes_of_rows_that_agree(length: int, everyone: bool) -> None:
    """Slots of one row for all, a selection of everyone, and a wish that differs by row."""
    whole = tokens(length=length)
    wish = torch.tensor([[True], [False], [True]]).expand(3, length)
    kept = torch.ones(3, length, dtype=torch.bool) if everyone else wish.roll(1, 0)
    part = whole.select_kept(kept)
    inner = whole.restrict_queries(wish).select(part)
    assert torch.equal(part.scatter(inner.queries.mask()), wish & kept)
    assert inner.query_tokens().slot_BT.shape[1] <= length


def test_everybody_kept_stays_in_place() -> None:
    part = tokens().select_kept(torch.ones(2, 5, dtype=torch.bool))
    assert part is EVERYONE
    assert tokens().select(part).queries is EVERYONE


def test_nobody_kept() -> None:
    part = tokens().select_kept(torch.zeros(2, 5, dtype=torch.bool))
    assert part.is_empty
    assert not part.mask().any()


def test_groups_tell_documents_and_padding() -> None:
    assert tokens().group_BT is None
    document = torch.tensor([[4, 4, 7, 7, 7]])
    assert torch.equal(replace(tokens(), document_BT=document).group_BT, document)
    real = torch.tensor([[True, True, True, False, False]])
    assert tokens(real=real).group_BT.tolist() == [[0, 0, 0, -1, -1]]
    assert replace(tokens(real=real), document_BT=document).group_BT.tolist() == [[4, 4, 7, -1, -1]]


def test_gains_multiply() -> None:
    half = torch.full((2, 5), 0.5)
    assert (tokens().scaled(half).scaled(half).gain_BT == 0.25).all()


def test_tokens_move_with_everything_inside() -> None:
    inner = replace(
        tokens().restrict_queries(WISH),
        state={"s": torch.ones(3, 5)},
        rotary=(torch.ones(1, 5, 2), torch.ones(1, 5, 2)),
    )
    moved = inner.to("meta")
    assert moved.slot_BT.device.type == moved.state["s"].device.type == moved.rotary[0].device.type == "meta"
    assert moved.queries.mask().device.type == "meta"
    assert moved.mode == inner.mode


def test_records_are_lifted() -> None:
    part, state = tokens().select_kept(KEPT), {"s": torch.arange(15.0).view(3, 5)}
    one = torch.ones(3, 3)
    inner = DepthRecord(one, one.bool(), one, one.bool(), one, {"s": -one})
    outer = inner.lift(part, state)
    assert torch.equal(outer.kept_BT, KEPT)
    assert torch.equal(outer.reached_BT, KEPT)
    assert torch.equal(outer.score_BT.isnan(), ~KEPT)
    assert torch.equal(outer.weight_BT, KEPT.float())
    assert torch.equal(outer.loss_BT, KEPT.float())
    assert torch.equal(outer.carry["s"], torch.where(KEPT, -torch.ones(3, 5), state["s"]))
    for steps in (1, 3):
        lifted = ActivationRecord(torch.ones(3, steps, 4), one.bool()).lift(part, state)
        assert torch.equal(lifted.logits_BTA.isnan().any(-1), ~KEPT)
        assert torch.equal(lifted.reached_BT, KEPT)
