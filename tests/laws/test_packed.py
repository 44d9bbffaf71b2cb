"""Law 4: documents packed in a row, with a cache, equal the documents alone; decoding continues the last one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

from laws.builders import (
    DECIDED,
    LENGTH,
    NESTED,
    ORDERS,
    VOCAB,
    Case,
    assert_close,
    case,
    depth_records,
    entry,
    ids,
    lively,
)
from laws.test_generation import plain_loop
from skipstone import SkipstoneForCausalLM

SOME = [c for c in ORDERS if len(c.mechanisms) in (1, 3)] + NESTED + [c for c in DECIDED if not c.oracle_only]
ENDS = [(4, 9, LENGTH), (1, 13, LENGTH), (7, 14, LENGTH)]  # of the documents of each row
WHOLE, CHUNKS = [(0, LENGTH)], [(0, 5), (5, 6), (6, 12), (12, LENGTH)]
NEW = 4


def documents() -> tuple[Tensor, Tensor]:
    """Document and position of every token; the ids themselves mean nothing."""
    document, position = torch.empty(3, LENGTH, dtype=torch.long), torch.empty(3, LENGTH, dtype=torch.long)
    for row, ends in enumerate(ENDS):
        for i, (a, b) in enumerate(zip((0, *ends), ends, strict=False)):
            document[row, a:b], position[row, a:b] = 7 - 2 * i, torch.arange(b - a)
    return document, position


def spans(row: int) -> list[tuple[int, int]]:
    return list(zip((0, *ENDS[row]), ENDS[row], strict=False))


def prefill(model: SkipstoneForCausalLM, tokens: Tensor, parts: list[tuple[int, int]]) -> tuple[DynamicCache, Any]:
    document, position = documents()
    cache, outs = DynamicCache(config=model.config), []
    for a, b in parts:
        where = {"document_ids": document[:, a:b], "position_ids": position[:, a:b]}
        outs.append(model(tokens[:, a:b], past_key_values=cache, output_records=True, **where))
    return cache, outs


@pytest.mark.parametrize("parts", [WHOLE, CHUNKS], ids=["whole", "chunks"])
@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_packed_prefill_and_decoding_on_equal_each_document_alone(chosen: Case, parts: list[tuple[int, int]]) -> None:
    model, tokens, more = lively(chosen), ids(seed=4), ids(length=NEW, seed=6)
    document, position = documents()
    cache, outs = prefill(model, tokens, parts)
    for t in range(NEW):
        where = {"document_ids": document[:, -1:], "position_ids": position[:, -1:] + t + 1}
        outs.append(model(more[:, t : t + 1], past_key_values=cache, output_records=True, **where))
    logits = torch.cat([out.logits for out in outs], 1)
    decided = [{(layer, name): r.kept_BT for layer, name, r in depth_records(out)} for out in outs]
    kept = {where: torch.cat([one[where] for one in decided], 1) for where in decided[0]}
    longer = torch.cat((tokens, more), 1)
    for row in range(3):
        for a, b in [*spans(row)[:-1], (spans(row)[-1][0], LENGTH + NEW)]:
            alone = model(longer[row : row + 1, a:b], use_cache=False, output_records=True)
            assert_close(logits[row : row + 1, a:b], alone.logits, f"row {row} {a}:{b}")
            for layer, name, own in depth_records(alone):
                assert torch.equal(kept[layer, name][row, a:b], own.kept_BT[0])


@pytest.mark.parametrize("chosen", SOME, ids=str)
@torch.no_grad()
def test_nothing_crosses_from_an_earlier_document(chosen: Case) -> None:
    """Other tokens in all documents but the last leave the last one's logits as they were."""
    model, tokens = lively(chosen), ids(seed=4)
    document, position = documents()
    last = document == document[:, -1:]
    other = torch.where(last, tokens, (tokens + 1 + ids(seed=9) % (VOCAB - 1)) % VOCAB)
    assert bool((other != tokens).eq(~last).all())
    said = []
    for given in (tokens, other):
        cache, _ = prefill(model, given, CHUNKS)
        where = {"document_ids": document[:, -1:], "position_ids": position[:, -1:] + 1}
        said.append(model(ids(length=1, seed=6), past_key_values=cache, **where).logits)
    assert_close(said[0], said[1], tolerance=1e-6)


@pytest.mark.parametrize("chosen", SOME, ids=str)
def test_generate_goes_on_with_the_last_document(chosen: Case) -> None:
    model, tokens = lively(chosen), ids(seed=4)
    document, _ = documents()
    options = {"document_ids": document, "max_new_tokens": NEW, "do_sample": False}
    expected = [plain_loop(model, tokens[row : row + 1, ENDS[row][1] :], NEW)[0, -NEW:] for row in range(3)]
    for more in ({}, {"use_cache": False}, {"prefill_chunk_size": 4}):
        got = model.generate(tokens, **options, **more)
        assert torch.equal(got[:, LENGTH:], torch.stack(expected)), more


def test_generate_from_padded_packed_rows() -> None:
    model, tokens = lively(case(entry("mixture_of_depths", decision="random"), activation="polyglu")), ids(seed=4)
    document, _ = documents()
    mask = torch.ones_like(tokens)
    mask[0, :6] = 0  # the first document and a part of the second
    got = model.generate(
        tokens, document_ids=document, attention_mask=mask, max_new_tokens=NEW, do_sample=False, pad_token_id=0
    )
    for row in range(3):
        alone = plain_loop(model, tokens[row : row + 1, ENDS[row][1] :], NEW)
        assert torch.equal(got[row, LENGTH:], alone[0, -NEW:])


def test_positions_are_asked_for_where_they_cannot_be_known() -> None:
    model = lively(case(entry("mixture_of_depths")))
    cache, _ = prefill(model, ids(), WHOLE)
    with pytest.raises(ValueError, match="document_ids need position_ids beside them once a cache holds"):
        model(ids(length=1), past_key_values=cache, document_ids=torch.zeros(3, 1, dtype=torch.long))
    with pytest.raises(ValueError, match="document_ids must be given in every call that shares a cache"):
        model(ids(length=1), past_key_values=cache)
