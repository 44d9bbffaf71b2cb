"""`prepare` builds a trainer's data from a `DataConfig`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from skipstone.core.strict import from_dict
from skipstone.data.config import DataConfig
from skipstone.data.prepare import prepare
from skipstone.data.tokenizers import byte_tokenizer

TEXT = "It was the best of times, it was the worst of times. é€ "


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for i, split in enumerate(("train", "valid", "test")):
        (tmp_path / f"{split}.txt").write_text(TEXT * (9 - 3 * i), encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("tokenizer", [None, "byte", "char"])
@pytest.mark.parametrize("packing", ["stream", "packed"])
def test_text_becomes_two_datasets(folder: Path, tokenizer: str | None, packing: str) -> None:
    config = from_dict(
        DataConfig, {"corpus": f"text:{folder}", "tokenizer": tokenizer, "packing": packing, "context": 16, "seed": 3}
    )
    data = prepare(config)
    assert data.config == config
    assert data.train is not None
    assert data.tokenizer is not None
    assert data.vocab_size == len(data.tokenizer)
    assert data.pad_id == data.tokenizer.pad_token_id
    text = TEXT * 6
    tokens = len(text) if tokenizer == "char" else len(text.encode())
    assert data.validation_labels == tokens - 1 == sum(int((row["labels"] != -100).sum()) for row in data.validation)
    assert data.validation_bytes == len(text.encode())
    assert ("document_ids" in data.train[0]) == (packing == "packed")
    assert data.tokenizer.decode(data.train[0]["input_ids"])[1:-1].strip("\ufffd") in TEXT * 3
    batch = data.collate([data.validation[0], data.validation[len(data.validation) - 1]])
    assert batch["input_ids"].shape == (2, 16)


def test_folders_of_files_are_joined_by_eos(tmp_path: Path) -> None:
    for i in range(20):
        (tmp_path / f"{i:02}.txt").write_text("x" * 10)
    data = prepare(DataConfig(corpus=f"text:{tmp_path}", context=8, packing="packed"))
    rows = [row["input_ids"].tolist() for row in data.validation]
    assert rows == [[*b"xxxxxxxx"], [*b"xxx", 256, *b"xxxx"], [*b"xxxxxxx"]]
    assert data.validation_labels == 21 - 2
    assert data.validation_bytes == 20


def test_another_split_an_own_tokenizer_and_no_train(folder: Path) -> None:
    config = DataConfig(corpus=f"text:{folder}", context=16, tokenizer="char")
    tokenizer = prepare(config).tokenizer
    (folder / "train.txt").write_bytes(b"\xff is not text")
    data = prepare(config, tokenizer=tokenizer, train=False, split="test")
    assert data.train is None
    assert data.tokenizer is tokenizer
    assert data.validation_labels == len(TEXT * 3) - 1


def test_lengths_are_asked_for_and_change_no_row(folder: Path) -> None:
    config = DataConfig(corpus=f"text:{folder}", context=16)
    whole, part = prepare(config), prepare(replace(config, train_rows=10_000, validation_rows=3))
    assert (len(part.train or ""), len(part.validation)) == (10_000, 3)
    assert part.validation_labels == 3 * 15
    assert part.validation_bytes == 46  # tokens reached, one byte each
    for i in range(3):
        assert torch.equal((whole.train or [])[i]["input_ids"], (part.train or [])[i]["input_ids"])
        assert torch.equal(whole.validation[i]["input_ids"], part.validation[i]["input_ids"])


@pytest.mark.parametrize(
    ("name", "context", "vocabulary", "labels"), [("reset-s3", 128, 29, 128), ("copy", 10, 32, 5), ("sort", 10, 32, 5)]
)
def test_synthetic_tasks_come_through_the_same_door(name: str, context: int, vocabulary: int, labels: int) -> None:
    first = prepare(DataConfig(corpus=name, context=context, seed=0))
    other = prepare(DataConfig(corpus=name, context=context, seed=1, train_rows=7, validation_rows=9), split="test")
    assert (first.tokenizer, first.validation_bytes, first.vocab_size) == (None, None, vocabulary)
    assert first.validation_labels == labels * len(first.validation) == labels * 1024
    assert (len(other.train or ""), len(other.validation)) == (7, 9)
    assert not torch.equal((first.train or [])[0]["input_ids"], (other.train or [])[0]["input_ids"])
    same = prepare(DataConfig(corpus=name, context=context, seed=1), train=False)
    assert same.train is None
    assert torch.equal(first.validation[5]["input_ids"], same.validation[5]["input_ids"])
    assert not torch.equal(first.validation[0]["input_ids"], (first.train or [])[0]["input_ids"])
    assert not torch.equal(first.validation[0]["input_ids"], other.validation[0]["input_ids"])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpus": "tiny_shakespeare"}, "did you mean 'tiny-shakespeare'"),
        ({"tokenizer": "bytes"}, "unknown tokenizer 'bytes'; did you mean 'byte'"),
        ({"context": 1}, "context must be at least 2, got 1"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
        ({"train_rows": 0}, "train_rows must be at least 1, got 0"),
        ({"validation_rows": -5}, "validation_rows must be at least 1, got -5"),
        ({"packing": "pack"}, "packing"),
        ({"contxt": 5}, "did you mean 'context'"),
        ({"corpus": "reset-s3", "tokenizer": "char"}, "is synthetic: leave tokenizer out, got 'char'"),
        ({"corpus": "copy", "packing": "packed"}, "is synthetic: leave packing out"),
    ],
)
def test_a_wrong_value_is_one_clear_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        from_dict(DataConfig, values, "data")
    assert "\n" not in str(caught.value)


def test_the_dataclass_checks_itself_too() -> None:
    with pytest.raises(ValueError, match="unknown packing 'pack'; did you mean 'packed'"):
        DataConfig(packing="pack")  # type: ignore[arg-type]


def test_a_tiny_or_empty_corpus_is_one_clear_line(tmp_path: Path) -> None:
    file = tmp_path / "tiny.txt"
    file.write_text("a few words only")
    with pytest.raises(ValueError, match=r"corpus 'text:.*': 14 training tokens are fewer than one context of 128"):
        prepare(DataConfig(corpus=f"text:{file}"))
    file.write_text("")
    with pytest.raises(ValueError, match="has no text in its split 'train'"):
        prepare(DataConfig(corpus=f"text:{file}"))


def test_an_unknown_split_is_named(folder: Path) -> None:
    with pytest.raises(ValueError, match="unknown split of corpus 'copy' 'val'"):
        prepare(DataConfig(corpus="copy", context=10), split="val")
    with pytest.raises(ValueError, match="unknown split of corpus 'text"):
        prepare(DataConfig(corpus=f"text:{folder}"), tokenizer=byte_tokenizer(), split="dev")


def test_shakespeare_is_cut_as_others_cut_it(data_dir: Path) -> None:
    if not (data_dir / "tiny-shakespeare" / "input.txt").is_file():
        pytest.skip("no tiny-shakespeare in SKIPSTONE_DATA")
    data = prepare(DataConfig(context=256))
    assert data.vocab_size == 65 + 3
    assert data.validation_labels == 111_540 - 1
    assert data.validation_bytes == 111_540
