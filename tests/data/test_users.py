"""The user's own corpora: files, folders, datasets."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path

import pytest

from skipstone.data.corpora import load_corpus


def parts(name: str) -> dict[str, tuple[str, ...]]:
    corpus = load_corpus(name)
    return {split: corpus.documents(split) for split in corpus.splits}


def test_a_file_is_one_stream_kept_byte_for_byte(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"0123\r\n6789")
    assert parts(f"text:{tmp_path / 'a.txt'}") == {"train": ("0123\r\n678",), "validation": ("9",)}


def test_a_folder_is_its_text_files_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "bbbbb", "a.txt": "aaaaa", "sub/c.txt": "ccccc", "no.md": "xxxxx"}.items():
        (tmp_path / name).write_text(text)
    assert parts(f"text:{tmp_path}") == {"train": ("aaaaa", "bbbbb", "ccc"), "validation": ("cc",)}


def test_a_folder_that_names_its_splits_is_taken_at_its_word(tmp_path: Path) -> None:
    for name in ("train", "valid", "test"):
        (tmp_path / f"{name}.txt").write_text(name)
    assert parts(f"text:{tmp_path}") == {"train": ("train",), "validation": ("valid",), "test": ("test",)}


def test_wrong_paths_and_encodings_are_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no file or folder"):
        load_corpus(f"text:{tmp_path / 'none.txt'}")
    with pytest.raises(FileNotFoundError, match=r"no \.txt file below"):
        load_corpus(f"text:{tmp_path}")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"latin\.txt is not UTF-8 text \(byte 3\)"):
        load_corpus(f"text:{tmp_path / 'latin.txt'}").documents("train")


@pytest.mark.parametrize("kind", ["text", "jsonl"])
def test_what_may_never_end_is_refused(kind: str) -> None:
    """Text of /dev/zero was read until memory ended, and a pipe for as long as nobody wrote into it."""
    with pytest.raises(ValueError, match=f"corpus {kind}:.*: it is a device or a pipe"):
        load_corpus(f"{kind}:{os.devnull}")


class TestDatasets:
    @pytest.fixture(autouse=True)
    def _library(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what the library's own imports warn about is not ours
            datasets = pytest.importorskip("datasets")
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
        datasets.disable_progress_bars()

    @staticmethod
    def write(folder: Path, split: str, column: str, rows: list[str]) -> None:
        folder.mkdir(exist_ok=True)
        lines = (json.dumps({column: row, "number": 1}) for row in rows)
        (folder / f"{split}.jsonl").write_text("\n".join(lines))

    def test_own_splits_are_used_and_rows_are_documents(self, tmp_path: Path) -> None:
        for split in ("train", "validation", "test"):
            self.write(tmp_path / "set", split, "text", [f"{split} one", "", f"{split} <eos> two"])
        expected = {split: (f"{split} one", f"{split} <eos> two") for split in ("train", "validation", "test")}
        assert parts(f"hf:{tmp_path / 'set'}") == expected

    def test_without_validation_train_is_cut_by_hash(self, tmp_path: Path) -> None:
        rows = [f"row {i}" for i in range(200)]
        self.write(tmp_path / "set", "train", "story", rows)
        found = parts(f"hf:{tmp_path / 'set'}")
        assert sorted(sum(found.values(), ())) == sorted(rows)
        assert list(found) == ["train", "validation", "test"]

    def test_no_column_of_text_names_the_columns(self, tmp_path: Path) -> None:
        (tmp_path / "set").mkdir()
        (tmp_path / "set" / "train.jsonl").write_text('{"question": "a", "answer": "b"}')
        with pytest.raises(ValueError, match=r"no column 'text' \(columns: question, answer\)"):
            load_corpus(f"hf:{tmp_path / 'set'}").documents("train")

    def test_offline_and_not_here_is_one_clear_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("SKIPSTONE_OFFLINE", "1")
        with pytest.raises(FileNotFoundError, match="corpus hf:nobody/nothing could not be loaded") as caught:
            load_corpus("hf:nobody/nothing")
        assert "\n" not in str(caught.value)

    def test_too_many_parts_are_refused(self) -> None:
        with pytest.raises(ValueError, match="expected NAME, OWNER/NAME"):
            load_corpus("hf:a/b/c/d")
