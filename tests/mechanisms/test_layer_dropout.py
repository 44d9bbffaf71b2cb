"""Layer dropout: which rows are left out, how often, by what factor, and what that saves."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from models import tiny_model
from skipstone import SkipstoneForCausalLM
from skipstone.core.selection import WholeRows
from skipstone.core.tokens import PassMode, Tokens
from skipstone.measure.flops import count_flops

ROWS, LENGTH, BLOCKS = 16, 12, 4
IDS = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH) ** 2 % 31


def model(**options: Any) -> SkipstoneForCausalLM:
    entries = [{"name": "layer_dropout", **options}]
    return tiny_model(mechanisms=entries, vocab_size=31, num_hidden_layers=BLOCKS, intermediate_size=48).train()


def kept(chosen: SkipstoneForCausalLM, **options: Any) -> Tensor:
    """Bool [blocks, rows], after checking that a row is kept as a whole."""
    out = chosen.train()(IDS, output_records=True, **options)
    masks = torch.stack([records["layer_dropout"].kept_BT for records in out.records])
    assert torch.equal(masks.all(2), masks.any(2))
    return masks.all(2)


@torch.no_grad()
def test_the_rate_rises_over_depth_and_falls_over_the_training() -> None:
    chosen = model(rate=0.9)
    mechanisms = list(chosen.routing_modules())
    assert [m.rate for m in mechanisms] == pytest.approx([0, 0.3, 0.6, 0.9])
    shares = torch.stack([kept(chosen).float().mean(1) for _ in range(40)]).mean(0)
    torch.testing.assert_close(shares, torch.tensor([1, 0.7, 0.4, 0.1]), rtol=0, atol=0.06)
    for m in mechanisms:
        m.advance(0.5, None)
    assert [m.rate for m in mechanisms] == pytest.approx([0, 0.15, 0.3, 0.45])
    for m in mechanisms:
        m.advance(1.0, None)
    assert kept(chosen).all()
    fixed = list(model(rate=0.5, over_depth="constant", over_training="constant").routing_modules())
    fixed[0].advance(0.9, None)
    assert [m.rate for m in fixed] == [0.5] * 4


@torch.no_grad()
def test_rows_and_blocks_are_drawn_apart_and_only_in_training() -> None:
    masks = kept(model(rate=0.5, over_depth="constant"))
    assert 0 < masks.float().mean() < 1
    assert all(0 < row.sum() < ROWS for row in masks)
    assert len({tuple(row.tolist()) for row in masks}) == BLOCKS
    assert kept(model(rate=0.5, over_depth="constant"), noise=False).all()
    assert kept(model(rate=0.5, over_depth="constant"), routing="causal").all()


@torch.no_grad()
def test_kept_updates_are_scaled_so_that_the_mean_is_the_dense_update() -> None:
    chosen = model(rate=0.5, over_depth="constant", layers=[1])
    out = chosen.train()(IDS, output_records=True)
    weight = out.records[1]["layer_dropout"].weight_BT
    assert {*weight.unique().tolist()} == {0.0, 2.0}
    plain = model(rate=0.5, over_depth="constant", layers=[1], scaled=False).train()(IDS, output_records=True)
    assert {*plain.records[1]["layer_dropout"].weight_BT.unique().tolist()} == {0.0, 1.0}


def test_rows_that_are_left_out_cost_nothing() -> None:
    """Also no attention scores: a gather to the fullest row would compute those of every row."""
    chosen = model(rate=0.5, over_depth="constant").train()
    outs: list[Any] = []
    found = count_flops(lambda: outs.append(chosen(IDS, output_records=True)))
    share = sum(float(r["layer_dropout"].kept_BT.float().mean()) for r in outs[0].records) / BLOCKS
    dense = chosen.cost(LENGTH, batch=ROWS).dense
    assert dense is not None
    assert 0.2 < share < 0.8
    for kind in ("attention_linear", "attention_score", "mlp"):
        assert found.by_kind[kind] == pytest.approx(share * getattr(dense.forward, kind), rel=1e-12)


def test_an_estimate_before_training_takes_the_mean_over_it() -> None:
    cost = model(rate=0.4).cost(LENGTH, routing="oracle")
    assert cost.dense is not None
    assert cost.forward.linear / cost.dense.forward.linear == pytest.approx(1 - 0.4 / 4)
    assert model(rate=0.4).cost(LENGTH).ratio == 1


def test_select_rows() -> None:
    slot = torch.arange(LENGTH)[None]
    mask = torch.zeros(5, LENGTH, dtype=torch.bool)
    mask[1], mask[4, :7] = True, True
    real = torch.ones_like(mask)
    real[4, 7:] = False
    given = Tokens(slot_BT=slot, position_BT=slot, real_BT=real, mode=PassMode(whole_rows=True))
    part, x = given.select_rows(mask), torch.randn(5, LENGTH, 3, requires_grad=True)
    assert isinstance(part, WholeRows)
    assert part.rows.at == (1, 4)
    assert torch.equal(part.mask(), mask)
    inner = given.select(part)
    assert inner.real_BT is not None
    assert inner.real_BT.sum(1).tolist() == [12, 7]
    back = part.scatter(part.gather(x))
    assert torch.equal(back, torch.where(mask[..., None], x, 0))
    back.sum().backward()
    assert torch.equal(x.grad, mask[..., None].expand_as(x).float())
    assert given.select_rows(torch.zeros_like(mask)).is_empty
    assert given.select_rows(torch.ones_like(mask)).is_all
    assert not isinstance(given.replace(mode=PassMode()).select_rows(mask), WholeRows)


@pytest.mark.parametrize(("rate", "words"), [(1.0, r"rate must be in \[0, 1\), got 1.0"), (-0.1, "got -0.1")])
def test_bad_rates_are_one_line(rate: float, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        model(rate=rate)
