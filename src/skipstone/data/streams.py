"""Streams of documents, for corpora that do not fit into memory; `skipstone prepare` reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from skipstone.core.strict import unknown
from skipstone.data import users
from skipstone.data.corpora import load_corpus
from skipstone.data.corpus import Corpus

TEXT = "text"
ONE_BY_ONE = "documents"


@dataclass(frozen=True, kw_only=True)
class Source:
    """Documents to be read one after another, as a stream for each split or as a single stream without splits.

    streams: for each split, a function without arguments that begins reading and returns an iterator of texts. A single
    stream has the key ""; callers divide it into splits by the hash of each document's text. size: bytes of the files
    that are read; None if unknown. unit: the unit in which progress is counted, "documents" or "bytes of JSON". total:
    the number of these units in all; None if unknown.
    """

    streams: Mapping[str, Callable[[], Iterator[str]]]
    size: int | None = None
    unit: str = ONE_BY_ONE
    total: int | None = None


def open_source(name: str, field: str | None = None) -> Source:
    """Open a corpus for reading one document after another, for text that does not fit into memory.

    name: `jsonl:PATH` or `hf:...` are streamed; any other text corpus of the registry is read as a whole, with its own
    splits. field: the field of a JSON object or dataset row that contains the text; None means "text", or the only
    column of strings of a dataset that has no "text". Raises ValueError for a field with any other corpus, and
    ValueError or FileNotFoundError for a corpus that cannot be found or read.
    """
    head, _, argument = name.partition(":")
    if head == "jsonl":
        files = users.jsonl_files(argument)
        size = sum(f.stat().st_size for f in files)
        packed = any(f.suffix == ".gz" for f in files)
        stream = partial(_lines, files, TEXT if field is None else field)
        return Source(streams={"": stream}, size=size, unit=users.BYTES, total=None if packed else size)
    if head == "hf":
        return _dataset(argument, field)
    if field is not None:
        raise ValueError(f"field applies to jsonl: and hf: only, got {field!r} with {name!r}")
    corpus = load_corpus(name)
    return Source(
        streams={split: partial(_documents, corpus, split) for split in corpus.splits},
        total=sum(len(corpus.documents(split)) for split in corpus.splits),
    )


def _documents(corpus: Corpus, split: str) -> Iterator[str]:
    return iter(corpus.documents(split))


def _lines(files: list[Path], field: str) -> Iterator[str]:
    return chain.from_iterable(users.read_jsonl(file, field) for file in files)


def _dataset(argument: str, field: str | None) -> Source:
    """Open a Hugging Face dataset: its own splits if it has train and validation, else train as a single stream.

    argument: `NAME`, `OWNER/NAME`, `OWNER/NAME/CONFIG` or a folder. field: the column with the text; None means "text"
    or the only column of strings.
    """
    loaded = users.load_dataset(argument, streaming=True)
    found = {split: next((n for n in names if n in loaded), None) for split, names in users.OWN_SPLITS.items()}
    if found["train"] is None:
        raise ValueError(f"corpus hf:{argument} has no split 'train' (splits: {', '.join(map(str, loaded))})")
    if found["validation"] is None:
        found = {"": found["train"]}
    return Source(
        streams={split: partial(_rows, loaded[own], argument, field) for split, own in found.items() if own is not None}
    )


def _rows(rows: Any, argument: str, field: str | None) -> Iterator[str]:
    for row in rows:
        if field is None:
            strings = [name for name, value in row.items() if isinstance(value, str)]
            field = TEXT if TEXT in row or len(strings) != 1 else strings[0]
        if field not in row:
            raise ValueError(unknown(f"column of hf:{argument}", field, row))
        if not isinstance(row[field], str | None):
            raise ValueError(f"column {field!r} of hf:{argument} is not text: {str(row[field])[:40]!r}")
        yield row[field] or ""
