"""Rows of token ids: a function of (seed, i), every token predicted once, documents kept apart."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, SequentialSampler
from transformers.loss.loss_utils import ForCausalLMLoss

from skipstone.data import draws
from skipstone.data.packing import CoveringWindows, RandomWindows, WindowsOnce, num_covering
from skipstone.data.rows import collate

IDS = np.arange(1000, dtype=np.uint16)


def predicted(rows: CoveringWindows) -> list[int]:
    """The labels that are predicted, row after row, as a model that shifts sees them."""
    labels = [row["labels"][1:] for row in rows]
    return [int(x) for x in torch.cat(labels) if x != -100]


@given(st.integers(2, 200), st.integers(2, 40))
def test_a_stream_predicts_every_token_but_the_first_exactly_once(tokens: int, context: int) -> None:
    rows = CoveringWindows(ids=IDS[:tokens], context=context, rows=num_covering(tokens, context))
    assert predicted(rows) == list(range(1, tokens))
    assert rows.num_labels == tokens - 1 == sum(int((row["labels"] != -100).sum()) for row in rows)
    lengths = [len(row["input_ids"]) for row in rows]
    assert all(length == context for length in lengths[:-1])
    assert 2 <= lengths[-1] <= context


@settings(max_examples=30)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.integers(2, 20))
def test_packed_predicts_every_token_but_documents_first_exactly_once(sizes: list[int], context: int) -> None:
    starts, tokens = np.cumsum([0, *sizes[:-1]]), sum(sizes)
    if tokens < 2:
        return
    rows = CoveringWindows(
        ids=IDS[:tokens], context=context, rows=num_covering(tokens, context), document_starts=starts
    )
    expected = [i for i in range(tokens) if i not in starts]
    assert predicted(rows) == expected
    assert rows.num_labels == len(expected)
    for fewer in range(1, len(rows) + 1):
        part = replace(rows, rows=fewer)
        assert part.num_labels == len(predicted(part))
    for row in rows:
        document = np.searchsorted(starts, row["input_ids"].numpy(), side="right") - 1
        assert row["document_ids"].tolist() == (document - document[0]).tolist()
        position = 0
        for slot, (before, now) in enumerate(pairwise([-1, *row["document_ids"].tolist()])):
            position = position + 1 if now == before else 0
            assert row["position_ids"][slot] == position


def test_random_windows_are_windows_and_reach_every_place() -> None:
    rows = RandomWindows(ids=IDS[:20], context=16, seed=0, rows=200)
    firsts = set()
    for row in rows:
        first = int(row["input_ids"][0])
        assert row["input_ids"].tolist() == list(range(first, first + 16))
        assert row["labels"].tolist() == [-100, *range(first + 1, first + 16)]
        firsts.add(first)
    assert firsts == set(range(5))


def test_row_i_depends_on_seed_and_i_alone() -> None:
    starts = np.array([0, 100, 101, 900])
    rows = RandomWindows(ids=IDS, context=32, seed=5, rows=50, document_starts=starts)
    forward = [rows[i] for i in range(50)]
    torch.manual_seed(9)
    np.random.seed(9)  # noqa: NPY002
    together = replace(rows, rows=10_000).__getitems__(list(reversed(range(50))))
    for one, other in zip(forward, reversed(together), strict=True):
        assert one.keys() == other.keys() == {"input_ids", "labels", "document_ids", "position_ids"}
        assert all(torch.equal(one[name], other[name]) for name in one)
    other_seed = replace(rows, seed=6)
    assert sum(torch.equal(forward[i]["input_ids"], other_seed[i]["input_ids"]) for i in range(50)) < 3


def test_a_loader_gives_the_rows_in_order() -> None:
    rows = RandomWindows(ids=IDS, context=8, seed=1, rows=12)
    batches = list(DataLoader(rows, batch_size=5, sampler=SequentialSampler(rows), collate_fn=collate))
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(5, 8), (5, 8), (2, 8)]
    assert torch.equal(torch.cat([b["labels"] for b in batches]), torch.stack([row["labels"] for row in rows]))
    assert all("attention_mask" not in batch for batch in batches)


def test_collate_pads_and_masks_only_when_rows_differ() -> None:
    rows = CoveringWindows(ids=IDS[:12], context=8, rows=2, document_starts=np.array([0, 10]))
    batch = collate([rows[1], rows[0]], pad_id=77)
    assert batch["input_ids"].tolist() == [[7, 8, 9, 10, 11, 77, 77, 77], list(range(8))]
    assert batch["labels"][0].tolist() == [-100, 8, 9, -100, 11, -100, -100, -100]
    assert batch["attention_mask"].tolist() == [[1] * 5 + [0] * 3, [1] * 8]
    assert batch["document_ids"][0].tolist() == [0, 0, 0, 1, 1, -1, -1, -1]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 0, 1, 0, 0, 0]
    assert all(x.dtype == torch.int64 for x in batch.values())


def test_the_loss_of_all_windows_is_the_loss_of_all_predictions() -> None:
    """A bigram model's loss does not depend on the window, so windows summed must equal the split taken whole."""
    logits = torch.randn(40, 40)
    ids = np.random.default_rng(0).integers(0, 40, 101).astype(np.uint16)
    rows = CoveringWindows(ids=ids, context=9, rows=num_covering(101, 9))
    batch = collate(list(rows))
    loss = ForCausalLMLoss(logits[batch["input_ids"]], batch["labels"], 40)
    whole = torch.from_numpy(ids.astype(np.int64))
    assert torch.allclose(loss, torch.nn.functional.cross_entropy(logits[whole[:-1]], whole[1:]), atol=1e-6)


def test_too_few_tokens_is_one_clear_line() -> None:
    with pytest.raises(ValueError, match="12 training tokens are fewer than one context of 16"):
        RandomWindows(ids=IDS[:12], context=16, seed=0, rows=1)
    with pytest.raises(ValueError, match="1 tokens cannot be evaluated"):
        CoveringWindows(ids=IDS[:1], context=16, rows=1)
    with pytest.raises(ValueError, match="rows must be at least 1, got 0"):
        RandomWindows(ids=IDS, context=16, seed=0, rows=0)
    with pytest.raises(ValueError, match="rows must be at most 1, got 2"):
        CoveringWindows(ids=IDS[:16], context=16, rows=2)
    with pytest.raises(IndexError):
        RandomWindows(ids=IDS, context=16, seed=0, rows=3)[3]
    with pytest.raises(IndexError):
        RandomWindows(ids=IDS, context=16, seed=0, rows=3)[-1]


def test_draws_are_uniform_and_independent_of_their_neighbours() -> None:
    u = draws.uniform(3, 0, np.arange(400), 500)
    assert 0 <= u.min() < 1e-4
    assert 1 - 1e-4 < u.max() < 1
    counts = np.bincount((u * 64).astype(int).ravel(), minlength=64)
    expected = u.size / 64
    assert ((counts - expected) ** 2 / expected).sum() < 110  # chi-squared, 63 degrees of freedom: p about 2e-4
    nearby = (
        (u[:, 1:], u[:, :-1]),
        (u[1:], u[:-1]),
        (u, draws.uniform(4, 0, np.arange(400), 500)),
        (u, draws.uniform(3, 1, np.arange(400), 500)),
    )
    for a, b in nearby:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 0.01  # 4.5 standard deviations


def plain_draw(seed: int, stream: int, row: int, column: int) -> float:
    """The same number in Python's own integers; a change of it would silently change every seeded run."""
    word, golden, mask = seed, 0x9E3779B97F4A7C15, (1 << 64) - 1

    def mix(x: int) -> int:
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    for counter in (stream, row, column):
        word = mix((word * golden + mix((counter + golden) & mask)) & mask)
    return (word >> 11) * 2.0**-53


def test_draws_are_a_fixed_function() -> None:
    rows = [0, 3, 1 << 40]
    found = draws.uniform(7, 2, rows, 5)
    assert found.tolist() == [[plain_draw(7, 2, row, column) for column in range(5)] for row in rows]
    assert np.array_equal(draws.uniform(7, 2, rows[1:], 4), found[1:, :4])
    assert draws.integers(7, 2, rows, 5, 10).tolist() == (found * 10).astype(int).tolist()


@given(st.integers(7, 60), st.integers(0, 3))
def test_windows_once_reads_every_whole_window_once_in_an_order_of_its_seed(tokens: int, seed: int) -> None:
    count = tokens // 7
    rows = WindowsOnce(ids=IDS[:tokens], context=7, rows=count, seed=seed)
    seen = sorted(int(row["input_ids"][0]) for row in rows)
    assert seen == [7 * i for i in range(count)]
    again = replace(rows, rows=max(1, count // 2))
    assert all(torch.equal(again[i]["input_ids"], rows[i]["input_ids"]) for i in range(len(again)))
    with pytest.raises(ValueError, match=r"with sampling 'once' none is read twice"):
        replace(rows, rows=count + 1)


def test_windows_once_depend_on_the_seed() -> None:
    first, other = (WindowsOnce(ids=IDS, context=10, rows=100, seed=seed)[0]["input_ids"] for seed in (0, 1))
    assert not torch.equal(first, other)
