"""Law 16: records are complete, in the row's coordinates, NaN for tokens not reached, and never stored on the model."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from laws.builders import ALL, DEPTH, LENGTH, Case, case, depth_records, entry, ids, lively

INSIDE = [n for n in DEPTH if n != "mixture_of_depths" and "block" in DEPTH[n].sites]


@pytest.mark.parametrize("chosen", ALL, ids=str)
@torch.no_grad()
def test_records_are_complete_and_consistent(chosen: Case) -> None:
    model, mask = lively(chosen), torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :3], mask[2, 12:] = 0, 0
    for routing in ["oracle"] if chosen.oracle_only else ["oracle", "causal"]:
        out = model(ids(), attention_mask=mask, routing=routing, noise=False, output_records=True)
        for block, records in zip(model.model.layers, out.records, strict=True):
            assert records.keys() == block.recorded()
            for record in records.values():
                assert record.reached_BT.shape == (3, LENGTH)
                assert not (record.reached_BT & ~mask.bool()).any()
                numbers = record[0]
                if numbers.shape[1] == LENGTH:
                    real = mask.bool() if numbers.dim() == 2 else mask.bool()[..., None].expand_as(numbers)
                    asked = record.reached_BT if numbers.dim() == 2 else record.reached_BT[..., None].expand_as(numbers)
                    assert torch.equal(numbers.isfinite() & real, asked)
        for _, _, record in depth_records(out):
            assert record.score_BT.dtype == record.weight_BT.dtype == torch.float32
            assert record.kept_BT.dtype == record.reached_BT.dtype == torch.bool
            assert not (record.kept_BT & ~record.reached_BT).any()
            assert (record.weight_BT[~record.kept_BT] == 0).all()
            assert record.weight_BT.isfinite().all()
            if record.loss_BT is not None:
                assert (record.loss_BT[~record.reached_BT] == 0).all()


@pytest.mark.parametrize("name", INSIDE)
@torch.no_grad()
def test_inner_records_are_lifted_to_the_outer_row(name: str) -> None:
    """The inner mechanism alone, on the gathered tokens, in their places; all others never asked."""
    model = lively(case(entry("mixture_of_depths"), entry(name), activation="polyglu"))
    for records in model(ids(), output_records=True).records[1:]:
        outer, inner, activation = records["mixture_of_depths"], records[name], records["polyglu"]
        assert torch.equal(inner.reached_BT, outer.kept_BT)
        assert 0 < inner.reached_BT.sum() < ids().numel()
        assert torch.equal(activation.reached_BT, inner.kept_BT)
        assert not inner.score_BT[~outer.kept_BT].isfinite().any()
        assert inner.kept_BT.any()
        assert (inner.kept_BT.sum() < inner.reached_BT.sum()) == model.model.layers[1].mechanisms[name].skips


@torch.no_grad()
def test_where_nobody_is_kept_the_names_stay() -> None:
    model = lively(
        case(entry("mixture_of_depths"), entry("early_exit"), entry("token_selective"), activation="polyglu")
    )
    none = torch.zeros(1, LENGTH, dtype=torch.bool)
    records = model(ids(), routing={1: none}, output_records=True).records[1]
    assert records.keys() == {"mixture_of_depths", "early_exit", "token_selective", "polyglu"}
    for name, record in records.items():
        assert record.reached_BT.all() if name == "mixture_of_depths" else not record.reached_BT.any()


@torch.no_grad()
def test_survival_only_falls_and_exits_are_final() -> None:
    model = lively(case(entry("early_exit", layers=(0, 1, 2))))
    records = [r["early_exit"] for r in model(ids(), output_records=True).records]
    for before, after in pairwise(records):
        assert (after.carry["early_exit"] < before.carry["early_exit"]).all()
        assert not (after.kept_BT & ~before.kept_BT).any()
        assert after.kept_BT.sum() < before.kept_BT.sum()


@torch.no_grad()
def test_a_token_that_skips_a_block_keeps_its_survival() -> None:
    model = lively(case(entry("mixture_of_depths"), entry("early_exit")))
    first, second = model(ids(), output_records=True).records[1:]
    survival, skipped = first["early_exit"].carry["early_exit"], ~first["mixture_of_depths"].kept_BT
    assert (survival[skipped] == 1).all()
    assert (survival[~skipped] < 1).all()
    both = skipped & ~second["mixture_of_depths"].kept_BT
    assert both.any()
    assert (second["early_exit"].carry["early_exit"][both] == 1).all()
    later = ~skipped & ~second["mixture_of_depths"].kept_BT
    assert later.any()
    assert torch.equal(second["early_exit"].carry["early_exit"][later], survival[later])


@pytest.mark.parametrize("chosen", ALL, ids=str)
def test_nothing_stays_on_the_model(chosen: Case) -> None:
    """No record, hook or tensor is left on a module; records are pytrees of tensors."""
    model = lively(chosen)
    before = {name: set(vars(module)) for name, module in model.named_modules()}
    out = model.train()(ids(), labels=ids(), output_records=True)
    for name, module in model.named_modules():
        assert set(vars(module)) == before[name]
        for key, value in vars(module).items():
            assert not isinstance(value, torch.Tensor) or isinstance(value, nn.Parameter), f"{name}.{key}"
    leaves = pytree.tree_leaves(out.records)
    assert all(leaf is None or isinstance(leaf, torch.Tensor) for leaf in leaves)


def test_records_are_handed_out_only_when_asked_for() -> None:
    model = lively(case(entry("mixture_of_depths")))
    assert model(ids()).records is None
    assert model.model(ids()).records is None
    assert len(model.model(ids(), output_records=True).records) == 3
    assert "records" in model.config.keys_to_ignore_at_inference
