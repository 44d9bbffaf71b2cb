"""Law 4: a row in a padded batch equals the row alone; a document in a packed row equals the document alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from laws.builders import ALL, LENGTH, NESTED, Case, assert_close, ids, lively
from skipstone.ops.reference import quota

LENGTHS = (LENGTH, 9, 4)
DOCUMENTS = [(0, 6), (6, 13), (13, LENGTH)]


def modes(chosen: Case) -> list[str]:
    return ["oracle"] if chosen.oracle_only else ["oracle", "causal"]


def padded(side: str) -> tuple[Tensor, Tensor, list[slice]]:
    tokens, mask = ids(seed=7), torch.zeros(3, LENGTH, dtype=torch.long)
    where = [slice(LENGTH - n, LENGTH) if side == "left" else slice(0, n) for n in LENGTHS]
    for row, at in enumerate(where):
        mask[row, at] = 1
    return tokens, mask, where


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("chosen", ALL, ids=str)
@torch.no_grad()
def test_row_in_a_padded_batch_is_the_row_alone(chosen: Case, side: str) -> None:
    model = lively(chosen)
    tokens, mask, where = padded(side)
    for routing in modes(chosen):
        batch = model(tokens, attention_mask=mask, routing=routing, noise=False, output_records=True)
        for row, at in enumerate(where):
            alone = model(tokens[row : row + 1, at], routing=routing, noise=False, output_records=True)
            assert_close(batch.logits[row, at], alone.logits[0], f"{routing} row {row}")
            for mine, own in zip(batch.records, alone.records, strict=True):
                for name in own:
                    if hasattr(own[name], "kept_BT"):
                        assert torch.equal(mine[name].kept_BT[row, at], own[name].kept_BT[0])
                        assert mine[name].kept_BT[row].sum() == own[name].kept_BT.sum()


@pytest.mark.parametrize("chosen", ALL, ids=str)
@torch.no_grad()
def test_packed_document_is_the_document_alone(chosen: Case) -> None:
    model, tokens = lively(chosen), ids(seed=8)
    documents = torch.empty(3, LENGTH, dtype=torch.long)
    positions = torch.empty(1, LENGTH, dtype=torch.long)
    for i, (a, b) in enumerate(DOCUMENTS):
        documents[:, a:b], positions[:, a:b] = 5 - i, torch.arange(b - a)
    for routing in modes(chosen):
        packed = {
            "document_ids": model(tokens, document_ids=documents, routing=routing, noise=False).logits,
            "position_ids": model(tokens, position_ids=positions, routing=routing, noise=False).logits,
        }
        for a, b in DOCUMENTS:
            alone = model(tokens[:, a:b], routing=routing, noise=False).logits
            for form, logits in packed.items():
                assert_close(logits[:, a:b], alone, f"{routing} {form} {a}:{b}")


@pytest.mark.parametrize("chosen", ALL, ids=str)
@torch.no_grad()
def test_packed_and_padded_at_once(chosen: Case) -> None:
    """What a packing collator gives: documents, then padding to the length of the batch."""
    # With seed 8, two tokens of one row have scores 2e-7 apart, and rounding decides which of them is kept.
    model, tokens, end = lively(chosen), ids(seed=12), 11
    documents = torch.tensor([[0] * 6 + [1] * 9] * 3)
    mask = (torch.arange(LENGTH) < end).long().expand(3, -1)
    for routing in modes(chosen):
        packed = model(tokens, document_ids=documents, attention_mask=mask, routing=routing, noise=False).logits
        for a, b in [(0, 6), (6, end)]:
            alone = model(tokens[:, a:b], routing=routing, noise=False).logits
            assert_close(packed[:, a:b], alone, f"{routing} {a}:{b}")


@pytest.mark.parametrize("capacity", [0.125, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("decision", ["topk", "random", "positional", "predictor"])
@torch.no_grad()
def test_quota_counts_each_document_without_padding(capacity: float, decision: str) -> None:
    from laws.builders import case, entry

    model, tokens = lively(case(entry("mixture_of_depths", capacity=capacity, decision=decision))), ids()
    documents = torch.tensor([[0] * 6 + [1] * 9] * 3)
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[1, :4], mask[2, 11:] = 0, 0
    out = model(tokens, document_ids=documents, attention_mask=mask, routing="oracle", noise=False, output_records=True)
    lengths = [(6, 9), (2, 9), (6, 5)]
    for layer in (1, 2):
        kept = out.records[layer]["mixture_of_depths"].kept_BT
        counted = [(kept[r, :6].sum().item(), kept[r, 6:].sum().item()) for r in range(3)]
        assert counted == [tuple(quota(capacity, n) for n in row) for row in lengths]


@pytest.mark.parametrize("chosen", NESTED, ids=str)
@torch.no_grad()
def test_a_row_of_padding_alone_harms_nobody(chosen: Case) -> None:
    model, mask = lively(chosen), torch.ones(3, LENGTH, dtype=torch.long)
    mask[1] = 0
    out = model(ids(), attention_mask=mask)
    assert out.logits.isfinite().all()
    assert_close(out.logits[[0, 2]], model(ids()[[0, 2]]).logits)
