"""Tokenised shards contain the text, are complete or absent, and are resumed after an interruption."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from skipstone.data import sharding, streams, users
from skipstone.data.corpora import load_corpus
from skipstone.data.encode import encode_documents
from skipstone.data.shards import MANIFEST, open_shards, open_sources
from skipstone.data.tokenizers import byte_tokenizer

EOS = 256
DOCUMENTS = [f"{i} é€ <eos> {'x' * (i % 7)}\n" for i in range(60)]


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(DOCUMENTS)))
    return path


def write(lines: Path, out: Path, **more: Any) -> Any:
    return sharding.write_shards(
        f"jsonl:{lines}", out, **{"tokenizer": "byte", "split": "80-20", "shard_tokens": 200, **more}
    )


def texts(folder: Path, split: str) -> list[str]:
    encoded = open_shards(folder).encoded(split)
    ends = [*encoded.document_starts[1:], len(encoded.ids)]
    pieces = [encoded.ids[int(a) : int(b)] for a, b in zip(encoded.document_starts, ends, strict=True)]
    assert all(piece[-1] == EOS for piece in pieces)
    assert [len(piece) - 1 for piece in pieces] == encoded.document_bytes.tolist()
    return [bytes(piece[:-1].astype(np.uint8)).decode() for piece in pieces]


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_every_file_of_the_tokenizer_is_checked(lines: Path, tmp_path: Path) -> None:
    manifest = write(lines, tmp_path / "out")
    assert {"tokenizer.json", "tokenizer_config.json"} <= manifest.tokenizer_files.keys()
    path = tmp_path / "out" / "tokenizer" / "tokenizer_config.json"
    path.write_text(path.read_text().replace('"eos_token": "<eos>"', '"eos_token": "<pad>"'))
    with pytest.raises(ValueError, match=r"tokenizer_config.json is damaged: its SHA-256"):
        open_shards(tmp_path / "out")
    path.unlink()
    with pytest.raises(ValueError, match=r"tokenizer_config.json is named in manifest.json and is not there"):
        open_shards(tmp_path / "out")
    values = json.loads((tmp_path / "out" / MANIFEST).read_text())
    del values["tokenizer_files"]
    (tmp_path / "out" / MANIFEST).write_text(json.dumps(values))
    open_shards(tmp_path / "out")  # as shards of earlier releases


def test_killed_before_its_first_note(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "..progress.json.partial").write_text('{"sett')
    manifest = write(lines, tmp_path / "out")
    assert write(lines, tmp_path / "out") == manifest
    (tmp_path / "out" / ".progress.json").write_text("{}")  # killed before it removed its notes
    assert write(lines, tmp_path / "out") == manifest
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"settings": {}, "shards": {"train": 3}, "place": {}}'])
def test_notes_that_cannot_be_read_are_one_line(text: str, lines: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".progress.json").write_text(text)
    with pytest.raises(ValueError, match=r"progress.json' cannot be read .*; remove .*out' and start again"):
        write(lines, tmp_path / "out")


def test_every_document_once_in_order_and_unaltered(lines: Path, tmp_path: Path) -> None:
    manifest = write(lines, tmp_path / "out")
    train, validation = texts(tmp_path / "out", "train"), texts(tmp_path / "out", "validation")
    assert sorted(train + validation) == sorted(DOCUMENTS)
    assert train == [text for text in DOCUMENTS if text in set(train)]
    corpus = load_corpus(f"jsonl:{lines}")
    assert set(corpus.documents("validation")) <= {*DOCUMENTS}, "the same lines without shards"
    assert len(manifest.splits["train"]) > 2
    assert all(shard.tokens >= 200 for shard in manifest.splits["train"][:-1])
    assert manifest.total("train", "documents") == len(train)
    assert manifest.total("train", "bytes") == sum(len(text.encode()) for text in train)
    assert (manifest.dtype, manifest.vocab_size) == ("uint16", 258)
    assert not [name for name in files(tmp_path / "out") if name.startswith(".")]


def test_ids_are_those_of_a_corpus_in_memory(lines: Path, tmp_path: Path) -> None:
    write(lines, tmp_path / "out")
    encoded = open_shards(tmp_path / "out").encoded("train")
    expected = encode_documents(byte_tokenizer(), texts(tmp_path / "out", "train"))
    assert np.array_equal(encoded.ids[:][:-1], expected.ids), "but for the eos after the last"
    assert np.array_equal(encoded.document_starts, expected.document_starts)
    slots = np.array([[5, 199], [len(encoded.ids) - 1, 230]])
    assert np.array_equal(encoded.ids[slots], encoded.ids[:][slots])


@pytest.mark.parametrize("after", [1, 17, 40, 59])
def test_it_goes_on_where_it_was_stopped(
    after: int, lines: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(lines, tmp_path / "whole")
    read = users.read_jsonl

    def cut(path: Path, field: str = "text") -> Iterator[str]:
        for number, text in enumerate(read(path, field)):
            if number == after:
                raise KeyboardInterrupt
            yield text

    with monkeypatch.context() as patch:
        patch.setattr(users, "read_jsonl", cut)
        with pytest.raises(KeyboardInterrupt):
            write(lines, tmp_path / "cut")
    assert not (tmp_path / "cut" / MANIFEST).exists()
    with pytest.raises(FileNotFoundError, match="holds no finished shards"):
        open_shards(tmp_path / "cut")
    encoded: list[str] = []
    each = sharding.encode_each

    def watched(tokenizer: Any, documents: Any, dtype: Any) -> Any:
        return each(tokenizer, (encoded.append(text) or text for text in documents), dtype)  # type: ignore[func-returns-value]

    monkeypatch.setattr(sharding, "encode_each", watched)
    write(lines, tmp_path / "cut")
    assert files(tmp_path / "cut") == files(tmp_path / "whole")
    assert len(encoded) < 60 or after < 17, "what is in a finished shard is not encoded again"


def test_finished_shards_are_left_as_they_are(lines: Path, tmp_path: Path) -> None:
    write(lines, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    write(lines, tmp_path / "out")
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")} == before
    with pytest.raises(FileExistsError, match="was started with shard_tokens 200, not 300"):
        write(lines, tmp_path / "out", shard_tokens=300)
    lines.write_text(lines.read_text() + json.dumps({"text": "more"}) + "\n")
    with pytest.raises(FileExistsError, match="was started with size"):
        write(lines, tmp_path / "out")


def test_a_folder_of_something_else_is_not_touched(lines: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("x")
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        write(lines, tmp_path / "mine")


def test_a_corpus_keeps_its_own_splits(tmp_path: Path) -> None:
    texts_of = {"train": "to be or not " * 30, "valid": "that is " * 9}
    for name, text in texts_of.items():
        (tmp_path / f"{name}.txt").write_text(text)
    sharding.write_shards(f"text:{tmp_path}", tmp_path / "out", tokenizer="char")
    opened = open_shards(tmp_path / "out")
    assert opened.tokenizer().decode(opened.encoded("validation").ids[:-1].tolist()) == texts_of["valid"]
    with pytest.raises(ValueError, match="has its own splits \\(train, validation\\): leave split out"):
        sharding.write_shards(f"text:{tmp_path}", tmp_path / "other", tokenizer="byte", split="90-10")


def test_datasets_are_streamed(lines: Path, tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text(lines.read_text().replace('"text"', '"body"'))
    sharding.write_shards(f"hf:{folder}", tmp_path / "out", tokenizer="byte", split="80-20", shard_tokens=500)
    assert sorted(texts(tmp_path / "out", "train") + texts(tmp_path / "out", "validation")) == sorted(DOCUMENTS)
    with pytest.raises(ValueError, match=r"unknown column of hf:.* 'bdy'; did you mean 'body'"):
        list(streams.open_source(f"hf:{folder}", "bdy").streams[""]())
    with pytest.raises(ValueError, match=r"column 'id' of hf:.* is not text: '0'"):
        list(streams.open_source(f"hf:{folder}", "id").streams[""]())


def test_files_are_read_in_order_and_gzip_too(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text('{"text": "second"}\n\n')
    with gzip.open(tmp_path / "a.jsonl.gz", "wt") as file:
        file.write('{"text": "first"}\n')
    assert list(streams.open_source(f"jsonl:{tmp_path}").streams[""]()) == ["first", "second"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"texts.jsonl, line 61, is not JSON"),
        ('{"body": "x"}', r"texts.jsonl, line 61: no text under 'text' \(its keys: body\)"),
        ('{"text": 3}', r"line 61: no text under 'text', which is of type int"),
        ("[1]", r"line 61: no text under 'text'"),
        ('{"text": "a\\ud800"}', r"document 60 of 'jsonl:.*' has a lone surrogate at character 1"),
    ],
)
def test_what_is_no_text_is_named(line: str, message: str, lines: Path, tmp_path: Path) -> None:
    lines.write_text(lines.read_text() + line + "\n")
    with pytest.raises(ValueError, match=message):
        write(lines, tmp_path / "out")


@pytest.mark.parametrize(
    ("source", "more", "message"),
    [
        ("reset-s3", {}, "'reset-s3' has no text to tokenise"),
        ("shards:x", {}, "'shards:x' has no text to tokenise"),
        ("jsonl:nowhere", {}, "there is no file or folder 'nowhere'"),
        ("tiny-shakespeare", {"field": "body"}, "field applies to jsonl: and hf: only"),
        ("python-stdlib", {"tokenizer": "bite"}, "unknown tokenizer 'bite'; did you mean 'byte'"),
        ("python-stdlib", {"shard_tokens": 0}, "shard_tokens must be at least 1, got 0"),
    ],
)
def test_refusals(source: str, more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        sharding.write_shards(source, tmp_path / "out", **{"tokenizer": "byte", **more})
    assert not (tmp_path / "out").exists()


def test_an_empty_field_is_no_default(lines: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no text under ''"):
        write(lines, tmp_path / "out", field="")


def test_a_split_without_text_is_named(lines: Path, tmp_path: Path) -> None:
    lines.write_text('{"text": "alone"}\n')
    with pytest.raises(ValueError, match=r"has no text for its split '(train|validation)'; name other shares"):
        write(lines, tmp_path / "out")


def test_damage_is_one_clear_line(lines: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    write(lines, folder)
    path = folder / "train-00001.tokens"
    good = path.read_bytes()
    path.write_bytes(bytes([good[0] ^ 1]) + good[1:])
    with pytest.raises(ValueError, match=r"train-00001.tokens is damaged: its SHA-256 is .*; make the shards again"):
        open_shards(folder).encoded("train")
    open_shards(folder).encoded("validation")
    path.write_bytes(good[:-2])
    with pytest.raises(ValueError, match=r"train-00001.tokens is damaged: it has \d+ bytes, manifest.json says \d+"):
        open_shards(folder).encoded("train")
    path.unlink()
    with pytest.raises(ValueError, match=r"train-00001.tokens is named in manifest.json and is not there"):
        open_shards(folder).encoded("train")
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is damaged"):
        open_shards(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"format_version": 1', '"format_version": 2', "format_version 2 with uint16 is not known"),
        ('"dtype"', '"dtyp"', "is not a manifest of shards .*'dtyp'"),
        ('"tokens"', '"token"', "is not a manifest of shards .*'token'"),
        ("{", "[", "is not a manifest of shards"),
    ],
)
def test_a_changed_manifest_is_one_clear_line(old: str, new: str, message: str, lines: Path, tmp_path: Path) -> None:
    write(lines, tmp_path / "out")
    path = tmp_path / "out" / MANIFEST
    path.write_text(path.read_text().replace(old, new, 1))
    with pytest.raises(ValueError, match=message):
        open_shards(tmp_path / "out")


def test_sources_must_share_their_tokenizer(lines: Path, tmp_path: Path) -> None:
    write(lines, tmp_path / "all" / "one")
    assert list(open_sources(tmp_path / "all")) == ["one"]
    assert list(open_sources(tmp_path / "all" / "one")) == ["one"]
    (tmp_path / "plain.txt").write_text("to be or not to be " * 9)
    sharding.write_shards(f"text:{tmp_path / 'plain.txt'}", tmp_path / "all" / "two", tokenizer="char")
    with pytest.raises(ValueError, match="tokenizer 'char' needs all of the text in advance"):
        write(lines, tmp_path / "out", tokenizer="char")
    with pytest.raises(ValueError, match="'one' and 'two' were made with different tokenizers"):
        open_sources(tmp_path / "all")
