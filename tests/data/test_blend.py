"""Blends of sources: shares, their change over a training, and no window read twice before all are read once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipstone.core.strict import from_dict
from skipstone.data import prepare as preparing
from skipstone.data.blend import BlendedWindows
from skipstone.data.config import Blend, DataConfig
from skipstone.data.prepare import PreparedData, prepare
from skipstone.data.sharding import write_shards

CONTEXT = 8
LETTERS = {"code": "c", "math": "m", "web": "w"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three sources of 40 documents, each of one letter and a number."""
    root = tmp_path_factory.mktemp("sources")
    for name, letter in LETTERS.items():
        path = root / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{letter * 15}{i:03}"}) + "\n" for i in range(40)))
        write_shards(f"jsonl:{path}", root / "shards" / name, tokenizer="byte", split="75-25", shard_tokens=100)
    return root / "shards"


def prepared(folder: Path, **more: Any) -> PreparedData:
    return prepare(from_dict(DataConfig, {"corpus": f"shards:{folder}", "context": CONTEXT, **more}))


def train(data: PreparedData) -> BlendedWindows:
    assert isinstance(data.train, BlendedWindows)
    return data.train


def share(rows: BlendedWindows, part: slice) -> list[float]:
    return [float((rows.plan[0][part] == i).mean()) for i in range(len(rows.names))]


ANNEALED = {
    "start": {"math": 70, "web": 25, "code": 5},
    "end": {"math": 85, "web": 10, "code": 5},
    "anneal_from": 0.8,
}


def test_shares_are_constant_and_then_a_straight_line() -> None:
    blend = from_dict(Blend, ANNEALED)
    assert blend.sources == ["code", "math", "web"]
    found = blend.shares(np.array([0, 0.5, 0.8, 0.9, 1.0]))
    expected = [[0.05, 0.7, 0.25]] * 3 + [[0.05, 0.775, 0.175], [0.05, 0.85, 0.1]]
    assert np.allclose(found, expected)
    assert np.allclose(Blend(start={"a": 3, "b": 1}).shares(np.array([0.0, 1.0])), [[0.75, 0.25]] * 2)


def test_rows_follow_the_shares(folder: Path) -> None:
    rows = replace(train(prepared(folder, blend=ANNEALED)), rows=20_000)
    assert share(rows, slice(0, 16_000)) == pytest.approx([0.05, 0.7, 0.25], abs=0.02)
    assert share(rows, slice(19_000, 20_000)) == pytest.approx([0.05, 0.8313, 0.1188], abs=0.04)
    letters = {name: ord(letter) for name, letter in LETTERS.items()}
    for i in range(50):
        row = rows[i]["input_ids"].tolist()
        assert set(row) <= {letters[rows.names[rows.plan[0][i]]], *b"0123456789", 256}


def test_a_row_follows_from_its_number_alone(folder: Path) -> None:
    rows = replace(train(prepared(folder, blend=ANNEALED, packing="packed", seed=4)), rows=300)
    alone = replace(train(prepared(folder, blend=ANNEALED, packing="packed", seed=4)), rows=300)
    together = rows.__getitems__(list(range(120, 180)))
    for i, row in enumerate(together, 120):
        for name, value in alone[i].items():
            assert np.array_equal(value, row[name])
    other = replace(train(prepared(folder, blend=ANNEALED, packing="packed", seed=5)), rows=300)
    assert not np.array_equal(other.plan[0], rows.plan[0])
    assert {"document_ids", "position_ids"} <= together[0].keys()


def test_every_window_comes_once_before_any_comes_twice(folder: Path) -> None:
    data = prepared(folder, blend={"start": {"math": 1}})
    rows = train(data)
    count = rows.sources[0].count
    rows = replace(rows, rows=3 * count)
    starts = rows.sources[0].nth(rows.plan[1]).reshape(3, count)
    for time in starts:
        assert sorted(time) == [CONTEXT * i for i in range(count)]
    assert not np.array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[1], starts[2])
    once = train(prepared(folder, blend={"start": {"math": 1}}, sampling="once"))
    assert np.array_equal(once.plan[1], np.arange(count))
    with pytest.raises(ValueError, match=f"{3 * count:,} training rows of 8 tokens from source 'math', which has"):
        replace(once, rows=3 * count)


def test_without_a_blend_as_much_as_there_are_tokens(folder: Path) -> None:
    rows = replace(train(prepared(folder)), rows=6000)
    tokens = [len(source.ids) for source in rows.sources]
    assert share(rows, slice(None)) == pytest.approx([n / sum(tokens) for n in tokens], abs=0.03)
    alone = train(prepared(folder / "web"))
    assert alone.names == ("web",)
    assert len(alone) == alone.sources[0].count


def test_validation_takes_sources_in_turn_and_counts_truly(folder: Path) -> None:
    whole = prepared(folder, packing="packed")
    labels = sum(int((row["labels"] != -100).sum()) for row in whole.validation)
    assert whole.validation_labels == labels
    documents = sum(
        len(source.document_starts)
        for source in (opened.encoded("validation") for opened in preparing.open_sources(folder).values())
    )
    assert whole.validation_bytes == 18 * documents
    first = prepared(folder, packing="packed", validation_rows=3)
    starts = [chr(int(row["input_ids"][0])) for row in first.validation]
    assert sorted(starts) == ["c", "m", "w"]
    assert first.validation_labels == sum(int((row["labels"] != -100).sum()) for row in first.validation)
    assert first.validation_bytes == 3 * CONTEXT
    assert prepared(folder, validation_rows=1).validation_labels == CONTEXT - 1
    for a, b in zip(first.validation, whole.validation, strict=False):
        assert np.array_equal(a["input_ids"], b["input_ids"])


def test_the_fingerprint_is_of_what_is_used(folder: Path) -> None:
    found = {name: prepared(folder, blend={"start": {name: 1}}).fingerprint for name in LETTERS}
    assert len({*found.values(), prepared(folder).fingerprint}) == 4
    assert prepared(folder).fingerprint == prepared(folder, seed=9, context=12).fingerprint


@pytest.mark.parametrize(
    ("blend", "message"),
    [
        ({"start": {"mth": 1}}, "unknown source in blend 'mth'; did you mean 'math'"),
        ({"start": {"math": -1}}, "blend.start must be shares that are not negative and not all 0"),
        ({"start": {"math": "x"}}, "blend.start must be shares"),
        ({"start": {"math": 1}, "end": {"web": 0}}, "blend.end must be shares"),
        ({"start": {"math": 1}, "end": {"web": 1}, "anneal_from": 1.0}, r"blend.anneal_from must be in \[0, 1\)"),
        ({"start": {"math": 1}, "anneal_from": 0.5}, "blend.anneal_from has no effect without blend.end"),
        ({"begin": {"math": 1}}, "unknown key in blend 'begin'"),
    ],
)
def test_refusals(blend: Any, message: str, folder: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prepared(folder, blend=blend)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpus": "python-stdlib", "blend": {"start": {"a": 1}}}, "blend applies to corpus shards:FOLDER only"),
        ({"corpus": "shards:x", "tokenizer": "byte"}, "corpus 'shards:x' has its tokenizer: leave tokenizer out"),
        ({"corpus": "shards"}, "corpus 'shards' is incomplete: write shards:FOLDER"),
    ],
)
def test_configurations_that_cannot_be(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_dict(DataConfig, values)


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="corpus shards:FOLDER: there is no folder"):
        prepared(tmp_path / "none")
    with pytest.raises(FileNotFoundError, match="holds no finished shards"):
        prepared(tmp_path)
