"""A window counts slots, not stored entries, and the cache forgets what no window reaches."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from laws.builders import DEPTH, Case, assert_close, case, entry, fresh, ids, lively
from skipstone.core.ragged_store import SLACK
from skipstone.measure.flops import count_flops
from skipstone.nn.windows import pairs

WINDOW = 3
CASES = [case(attention_window=WINDOW), *(case(entry(name), attention_window=WINDOW) for name in DEPTH)]
ROUTED = case(entry("mixture_of_depths"), attention_window=WINDOW)
LONG = WINDOW + 2 * SLACK + 40


@pytest.mark.parametrize("chosen", CASES, ids=str)
@torch.no_grad()
def test_what_lies_beyond_all_windows_changes_nothing(chosen: Case) -> None:
    """Decisions given: a token sees 3 blocks times 2 slots back, whichever tokens are kept in between."""
    model = lively(chosen)
    masks = {i: torch.rand(1, 20) < 0.5 for i in (1, 2)} if chosen.mechanisms else "causal"
    reach = 3 * (WINDOW - 1)
    for length in (20, 5):  # in bands, and with a mask
        given = {i: mask[:, :length] for i, mask in masks.items()} if chosen.mechanisms else "causal"
        first, other = ids(1, length), ids(1, length)
        other[0, 0] = (other[0, 0] + 1) % 61
        changed = (model(first, routing=given).logits - model(other, routing=given).logits).abs().amax(-1)[0]
        assert (changed[reach + 1 :] == 0).all()
        assert changed[0] > 0
    assert_close(model(ids(1, WINDOW)).logits, _without(model, ids(1, WINDOW)), "no row is longer than the window")


def _without(model: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    for block in model.model.layers:
        block.self_attn.window = None
    return model(tokens).logits


@torch.no_grad()
def test_skipped_tokens_take_their_place_in_a_window() -> None:
    """Of the kept tokens 0 and 3, the second does not see the first: two entries, but four slots."""
    model = lively(case(entry("mixture_of_depths", layers=(0,)), attention_window=WINDOW, num_hidden_layers=1))
    kept = torch.tensor([[True, False, False, True]])
    first, other = ids(1, 4), ids(1, 4)
    other[0, 0] = (other[0, 0] + 1) % 61
    a, b = (model(x, routing={0: kept}).logits[0, 3] for x in (first, other))
    assert torch.equal(a, b)
    kept = torch.tensor([[False, True, False, True]])
    other = first.clone()
    other[0, 1] = (other[0, 1] + 1) % 61
    a, b = (model(x, routing={0: kept}).logits[0, 3] for x in (first, other))
    assert not torch.equal(a, b)


@pytest.mark.parametrize("chosen", [pytest.param(CASES[0], marks=pytest.mark.slow), ROUTED], ids=str)
@torch.no_grad()
def test_the_cache_forgets_and_the_text_goes_on_the_same(chosen: Case) -> None:
    model = fresh(chosen, max_position_embeddings=2 * LONG)
    tokens, mask = ids(2, LONG), torch.ones(2, LONG, dtype=torch.long)
    mask[0, :30] = 0
    whole = model(tokens, attention_mask=mask, use_cache=False).logits
    cache, at = DynamicCache(config=model.config), LONG - 90
    logits = [model(tokens[:, :at], attention_mask=mask[:, :at], past_key_values=cache).logits]
    for t in range(at, LONG):
        given = {"attention_mask": mask[:, : t + 1], "past_key_values": cache}
        logits += [model(tokens[:, t : t + 1], **given).logits]
    assert_close(torch.cat(logits, 1)[mask.bool()], whole[mask.bool()])
    dense = cache.layers[0].kv
    assert dense.width <= WINDOW + 2 * SLACK < LONG
    assert dense.forgotten == [LONG - 30 - dense.row_lengths(2, tokens.device)[0], LONG - dense.width]


@torch.no_grad()
def test_a_cache_that_forgot_is_cropped_exactly_or_not_at_all() -> None:
    model = fresh(CASES[0], max_position_embeddings=2 * LONG)
    tokens = ids(2, LONG)
    whole = model(tokens, use_cache=False).logits
    cache = DynamicCache(config=model.config)
    model(tokens, past_key_values=cache)
    assert cache.layers[0].kv.width == WINDOW + SLACK
    cache.reorder_cache(torch.tensor([1, 0]))
    cache.crop(-SLACK)
    assert_close(model(tokens[[1, 0], -SLACK:], past_key_values=cache).logits, whole[[1, 0], -SLACK:])
    with pytest.raises(ValueError, match=f"cannot be cropped to 9 tokens: a block with a window of {WINDOW}"):
        cache.crop(9)


@torch.no_grad()
def test_fewer_scores_are_computed_than_in_the_whole_row() -> None:
    model = lively(case(attention_window=WINDOW))
    scores = count_flops(lambda: model(ids(2, 40))).by_kind["attention_score"]
    assert scores == model.cost(40, batch=2).forward.attention_score
    assert scores == 4 * 2 * pairs(40, WINDOW) * 32 * 3
    assert pairs(40, WINDOW) == 14 * WINDOW * 2 * WINDOW
