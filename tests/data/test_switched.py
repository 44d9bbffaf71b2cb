"""Switched-S3 and the mixed corpus, compared with slow references written from their definitions."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from skipstone.data.config import DataConfig
from skipstone.data.mixed import SPAN, TEXT
from skipstone.data.prepare import PreparedData, prepare
from skipstone.data.switched import FIRST_ELEMENT, FIRST_STATE, OFF, ON, RESET, VOCAB_SIZE, SwitchedS3
from skipstone.data.synthetic import BINS, ELEMENTS

ROWS = SwitchedS3(rows=2000, seed=0)


def reference(entries: list[int]) -> tuple[list[int], list[int]]:
    """Labels and difficulties, one entry after another, in permutations rather than indices."""
    labels, difficulties = [], []
    on, state, since = False, (0, 1, 2), 0
    for entry in entries:
        if entry in (OFF, ON):
            on = entry == ON
        if entry in (OFF, ON) or not on:
            labels.append(entry)
            difficulties.append(-1)
            continue
        element = ELEMENTS[entry - FIRST_ELEMENT] if entry != RESET else None
        state, since = ((0, 1, 2), 0) if element is None else (tuple(state[x] for x in element), since + 1)
        labels.append(FIRST_STATE + ELEMENTS.index(state))
        difficulties.append(since)
    return labels, difficulties


def test_rows_equal_the_reference() -> None:
    for i in range(50):
        row = ROWS[i]
        labels, difficulties = reference(row["input_ids"].tolist())
        assert row["shift_labels"].tolist() == labels
        assert row["difficulty"].tolist() == difficulties
        assert row["labels"].tolist() == [-100, *labels[:-1]]


def test_the_distribution_is_the_definition() -> None:
    rows = ROWS.__getitems__(range(2000))
    entries, difficulty = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "difficulty"))
    assert (entries[:, 0] <= ON).all()
    later = entries[:, 1:].flatten()
    total, counts = later.numel(), torch.bincount(later, minlength=VOCAB_SIZE)
    assert counts[FIRST_STATE:].sum() == 0  # the state is never shown
    symbol = 7 / 8
    expected = [1 / 8 * 5 / 7, 1 / 8 * 2 / 7, *[symbol * 15 / 16 / 6] * 6, symbol / 16]
    for count, share in zip(counts[:FIRST_STATE].tolist(), expected, strict=True):
        assert abs(count - share * total) < 5 * math.sqrt(share * total)
    operation = (difficulty >= 0)[:, 1:]
    assert float(operation.double().mean()) == pytest.approx(0.25, abs=0.01)
    reached = [int(((difficulty >= low) & (difficulty <= (high or 999))).sum()) for low, high in BINS.values()]
    assert sum(reached) == int((difficulty >= 0).sum())
    assert min(reached) > 0.1 * sum(reached)  # no bin is too thin to measure


def test_a_symbol_does_not_tell_whether_it_is_an_operation() -> None:
    rows = ROWS.__getitems__(range(2000))
    entries, difficulty = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "difficulty"))
    for symbol in range(FIRST_ELEMENT, RESET + 1):
        share = float((difficulty[entries == symbol] >= 0).double().mean())
        assert share == pytest.approx(2 / 7, abs=0.02), symbol


def test_row_i_is_a_function_of_seed_stream_and_i() -> None:
    together = replace(ROWS, rows=5).__getitems__([4, 0])
    for name in together[0]:
        assert torch.equal(together[0][name], ROWS[4][name])
        assert torch.equal(together[1][name], ROWS[0][name])
    for other in (replace(ROWS, seed=1), replace(ROWS, stream=1), replace(ROWS, stream=2)):
        assert not torch.equal(other[0]["input_ids"], ROWS[0]["input_ids"])


def test_it_comes_through_the_same_door() -> None:
    data = prepare(DataConfig(corpus="switched-s3", context=48, validation_rows=9))
    assert (data.vocab_size, data.tokenizer, data.validation_labels) == (VOCAB_SIZE, None, 9 * 48)
    assert data.config.tells_difficulty


TEXT_LINE = "a stone that skips over water, and another. "


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT_LINE * 2000, encoding="utf-8")
    return f"text:{path}"


@pytest.fixture(scope="module")
def mixed(corpus: str) -> PreparedData:
    return prepare(DataConfig(corpus=f"mixed:{corpus}", context=64, train_rows=400))


def test_outside_of_spans_rows_are_the_text(corpus: str, mixed: PreparedData) -> None:
    plain = prepare(DataConfig(corpus=corpus, context=64, train_rows=1000))
    assert mixed.train is not None
    for ours, theirs in ((mixed.train, plain.train), (mixed.validation, plain.validation)):
        assert theirs is not None
        for i in (*range(40), len(ours) - 1):
            a, b = ours[i], theirs[i]
            text = a["difficulty"] == TEXT
            assert torch.equal(a["input_ids"][text], b["input_ids"][text])
            assert a["labels"].tolist()[1:] == a["shift_labels"].tolist()[:-1]
            following = text & text.roll(-1)
            following[-1] = False
            assert torch.equal(a["shift_labels"][following], b["input_ids"].roll(-1)[following])
            assert (a["shift_labels"][text & ~following] == -100).sum() == (text & ~following).sum()


def test_spans_are_switched_s3_in_half_of_the_windows(mixed: PreparedData) -> None:
    assert mixed.train is not None
    starts = []
    for row in mixed.train:
        inside = (row["difficulty"] != TEXT).nonzero()[:, 0]
        if not len(inside):
            continue
        start = int(inside[0])
        starts.append(start)
        assert inside.tolist() == list(range(start, start + SPAN))
        entries = (row["input_ids"][inside] - 258).tolist()
        labels, difficulties = reference(entries)
        assert (row["shift_labels"][inside] - 258).tolist() == labels
        assert row["difficulty"][inside].tolist() == difficulties
    assert len(starts) / 400 == pytest.approx(0.5, abs=0.05)
    assert (min(starts), max(starts)) == (1, 64 - 1 - SPAN)
    assert np.mean(starts) == pytest.approx((1 + 31) / 2, abs=1)


def test_validation_counts_every_prediction(mixed: PreparedData) -> None:
    asked = sum(int((row["shift_labels"] != -100).sum()) for row in mixed.validation)
    assert mixed.validation_labels == asked
    assert mixed.validation_bytes is None


def test_the_tokenizer_knows_the_spans(corpus: str, mixed: PreparedData) -> None:
    assert mixed.tokenizer is not None
    assert mixed.vocab_size == len(mixed.tokenizer) == 258 + VOCAB_SIZE
    assert mixed.tokenizer.decode([104, 258, 259, 266]) == "h<off><on><reset>"
    again = prepare(DataConfig(corpus=f"mixed:{corpus}", context=64), tokenizer=mixed.tokenizer, train=False)
    assert again.vocab_size == mixed.vocab_size
    assert all(torch.equal(again.validation[i]["input_ids"], mixed.validation[i]["input_ids"]) for i in range(20))


def test_seeds_and_splits_differ_and_lengths_do_not(corpus: str, mixed: PreparedData) -> None:
    assert mixed.train is not None
    other = prepare(DataConfig(corpus=f"mixed:{corpus}", context=64, seed=1))
    assert other.train is not None
    assert any(not torch.equal(other.train[i]["difficulty"], mixed.train[i]["difficulty"]) for i in range(9))
    assert all(torch.equal(other.validation[i]["difficulty"], mixed.validation[i]["difficulty"]) for i in range(9))
    longer = replace(mixed.train, rows=5000)
    assert torch.equal(longer[3]["input_ids"], mixed.train[3]["input_ids"])
    assert len(longer[4999]["input_ids"]) == 64


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpus": "mixed"}, "incomplete: write mixed:CORPUS"),
        ({"corpus": "mixed:tiny-shakespeare", "packing": "packed"}, "leave packing out"),
        ({"corpus": "switched-s3:x"}, "takes nothing after a colon"),
    ],
)
def test_a_wrong_name_is_one_clear_line(values: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataConfig(**values)  # type: ignore[arg-type]


def test_a_context_too_short_for_a_span_is_refused(corpus: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="context must be at least 34"):
        prepare(DataConfig(corpus=f"mixed:{corpus}", context=33))
    with pytest.raises(ValueError, match="is synthetic: it has rows"):
        prepare(DataConfig(corpus="mixed:reset-s3"))
