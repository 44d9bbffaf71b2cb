"""Reset-S3, compared with a slow reference written from its definition; copy and sort."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.loss.loss_utils import ForCausalLMLoss

from skipstone.data.rows import collate
from skipstone.data.sequences import END, SEPARATOR, Sequences
from skipstone.data.synthetic import (
    BINS,
    ELEMENTS,
    MULTIPLY,
    VOCAB_SIZE,
    ResetS3,
    accuracy_by_bin,
    oracle_keep,
)

ROWS = ResetS3(rows=2000, seed=0)


def compose(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...]:
    """First b, then a."""
    return tuple(a[x] for x in b)


def reference(entries: list[int]) -> tuple[list[int], list[int]]:
    """Labels and difficulties by recomputing each product from the reset, in permutations rather than indices."""
    labels, difficulties = [], []
    for t, entry in enumerate(entries):
        if entry < 16:
            labels.append(entry)
            difficulties.append(-1)
            continue
        resets = [s for s in range(t + 1) if entries[s] == 22]
        since = [e for e in entries[(resets[-1] + 1) if resets else 0 : t + 1] if e >= 16]
        product: tuple[int, ...] = (0, 1, 2)
        for element in since:
            product = compose(product, ELEMENTS[element - 16])
        labels.append(23 + ELEMENTS.index(product))
        difficulties.append(len(since))
    return labels, difficulties


def test_the_table_is_the_group_s3() -> None:
    every = range(6)
    assert len(set(ELEMENTS)) == 6
    assert all(ELEMENTS[MULTIPLY[a, b]] == compose(ELEMENTS[a], ELEMENTS[b]) for a in every for b in every)
    assert all(MULTIPLY[MULTIPLY[a, b], c] == MULTIPLY[a, MULTIPLY[b, c]] for a in every for b in every for c in every)
    assert all(MULTIPLY[0, a] == a == MULTIPLY[a, 0] for a in every)
    assert all(sorted(MULTIPLY[a]) == sorted(MULTIPLY[:, a]) == list(every) for a in every)
    assert (MULTIPLY != MULTIPLY.T).any()


def test_rows_equal_the_reference() -> None:
    for i in range(150):
        row = ROWS[i]
        labels, difficulties = reference(row["input_ids"].tolist())
        assert row["shift_labels"].tolist() == labels
        assert row["difficulty"].tolist() == difficulties
        assert row["labels"].tolist() == [-100, *labels[:-1]]
        assert oracle_keep(row["input_ids"]).tolist() == [d >= 0 for d in difficulties]


def test_the_distribution_is_the_definition() -> None:
    entries = torch.stack([row["input_ids"] for row in ROWS.__getitems__(range(2000))])
    assert entries.shape == (2000, 128)
    total, counts = entries.numel(), torch.bincount(entries.flatten(), minlength=VOCAB_SIZE)
    assert counts[23:].sum() == 0  # the state is never shown
    expected = [0.75 / 16] * 16 + [0.25 * 15 / 16 / 6] * 6 + [0.25 / 16]
    for count, share in zip(counts[:23].tolist(), expected, strict=True):
        assert abs(count - share * total) < 5 * math.sqrt(share * total)
    operation = (entries >= 16).double()
    neighbours = torch.corrcoef(torch.stack([operation[:, 1:].flatten(), operation[:, :-1].flatten()]))
    assert abs(neighbours[0, 1]) < 0.01
    difficulty = torch.stack([row["difficulty"] for row in ROWS.__getitems__(range(2000))])
    reached = {
        name: int(((difficulty >= low) & (difficulty <= (high or 999))).sum()) for name, (low, high) in BINS.items()
    }
    assert sum(reached.values()) == int(operation.sum())
    assert min(reached.values()) > 0.1 * sum(reached.values())  # no bin is too thin to measure


def test_row_i_is_a_function_of_seed_stream_and_i() -> None:
    together = replace(ROWS, rows=5).__getitems__([4, 0])
    for name in together[0]:
        assert torch.equal(together[0][name], ROWS[4][name])
        assert torch.equal(together[1][name], ROWS[0][name])
    for other in (replace(ROWS, seed=1), replace(ROWS, stream=1), replace(ROWS, stream=2)):
        assert not torch.equal(other[0]["input_ids"], ROWS[0]["input_ids"])


def test_a_model_that_shifts_labels_itself_sees_the_same_targets() -> None:
    batch = collate(ROWS.__getitems__(range(4)))
    logits = torch.randn(4, 128, VOCAB_SIZE)
    aligned = ForCausalLMLoss(logits, None, VOCAB_SIZE, shift_labels=batch["shift_labels"], num_items_in_batch=1)
    shifted = ForCausalLMLoss(logits, batch["labels"], VOCAB_SIZE, num_items_in_batch=1)
    last = torch.nn.functional.cross_entropy(logits[:, -1], batch["shift_labels"][:, -1], reduction="sum")
    assert torch.allclose(aligned, shifted + last, rtol=1e-5)


def test_accuracy_by_bin_counts_operations_only() -> None:
    difficulty = torch.tensor([[-1, 0, 3, 4], [7, 7, 8, 15]])
    labels = torch.zeros(2, 4, dtype=torch.int64)
    predictions = torch.tensor([[9, 0, 1, 0], [1, 1, 0, 0]])
    found = accuracy_by_bin(predictions, labels, difficulty)
    assert {name: found[name] for name in ("0-3", "4-7", "8-15")} == {
        "0-3": 0.5,
        "4-7": pytest.approx(1 / 3),
        "8-15": 1.0,
    }
    assert math.isnan(found["16+"])
    assert accuracy_by_bin([0], [0], [40]) == pytest.approx(
        {"0-3": math.nan, "4-7": math.nan, "8-15": math.nan, "16+": 1.0}, nan_ok=True
    )
    with pytest.raises(ValueError, match="must have one shape"):
        accuracy_by_bin(predictions, labels, difficulty[0])


@pytest.mark.parametrize("task", ["copy", "sort"])
def test_sequences_answer_what_was_asked(task: str) -> None:
    rows = Sequences(rows=100, task=task, context=22, seed=0)  # type: ignore[arg-type]
    for row in rows:
        entries = row["input_ids"].tolist()
        asked, answer = entries[:10], entries[11:21]
        assert (entries[10], entries[21]) == (SEPARATOR, END)
        assert answer == (sorted(asked) if task == "sort" else asked)
        assert max(asked) < SEPARATOR
        assert row["labels"].tolist() == [-100] * 11 + answer + [END]
    assert len({tuple(row["input_ids"].tolist()) for row in rows}) == 100
    assert torch.equal(replace(rows, rows=7)[6]["input_ids"], rows[6]["input_ids"])
    used = np.concatenate([row["input_ids"][:10].numpy() for row in rows])
    assert set(used) == set(range(30))


@pytest.mark.parametrize("context", [2, 21])
def test_a_context_that_no_n_gives_is_refused(context: int) -> None:
    with pytest.raises(ValueError, match="must be 2n \\+ 2"):
        Sequences(rows=1, task="copy", context=context, seed=0)


@pytest.mark.parametrize("shapes", [((6,), (1,), (6,)), ((6,), (6,), (3,)), ((2, 3), (3,), (2, 3)), ((), (6,), (6,))])
def test_accuracy_of_different_shapes_is_refused(shapes: tuple[tuple[int, ...], ...]) -> None:
    with pytest.raises(ValueError, match="must have one shape"):
        accuracy_by_bin(*(np.zeros(shape, np.int64) for shape in shapes))
