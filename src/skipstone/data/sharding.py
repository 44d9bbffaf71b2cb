"""`write_shards`: read, encode and write documents one after the other, so that text of any size can be tokenised.

Every file is written under a temporary name and renamed when complete; the manifest comes last. Progress is recorded,
so that the same call resumes an interrupted one: earlier documents are read again but not encoded.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from skipstone.core import atomic_write, progress_bar
from skipstone.core.checksums import file_sha256
from skipstone.core.lock import locked
from skipstone.core.sealed import read_sealed, sealed
from skipstone.core.strict import PlainDict, from_dict
from skipstone.data.corpora import find_entry, load_corpus
from skipstone.data.corpus import parse_percent, split_by_hash
from skipstone.data.encode import encode_each, id_dtype
from skipstone.data.ids import Ids
from skipstone.data.shards import (
    DOCUMENTS,
    FORMAT_VERSION,
    INDEX,
    MANIFEST,
    TOKENIZER,
    TOKENS,
    Manifest,
    Shard,
    open_shards,
)
from skipstone.data.streams import ONE_BY_ONE, open_source
from skipstone.data.tokenizers import build_tokenizer, check_spec, needs_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROGRESS = ".progress.json"
SHARD_TOKENS = 1 << 27
USUAL_SPLIT = "98-1-1"
Report = Callable[[str, int, int], None]


def write_shards(
    source: str,
    out: Path,
    *,
    tokenizer: str,
    field: str | None = None,
    split: str | None = None,
    shard_tokens: int = SHARD_TOKENS,
    report: Report | None = None,
) -> Manifest:
    """Tokenise a corpus of any size into files of token ids in the folder `out`; an interrupted call can be repeated.

    source: `jsonl:PATH`, `hf:NAME` for a dataset of the Hugging Face hub (both read as streams), or the name of any
    other text corpus. tokenizer: `byte`, `pretrained:NAME_OR_PATH` or, for sources with their own splits, `char` or
    `bpe:SIZE`. field: the field of a JSON object or row that contains the text; None means "text", or the only column
    of strings of a dataset without "text". split: per cent of the documents for train, validation and test, by hash of
    their text, only for sources without splits of their own; None means "98-1-1". shard_tokens: a shard
    ends with the document that reaches this number of tokens. report: called after each shard with the name of its
    split and the numbers of documents and tokens of that split so far. Returns the manifest; if the same call has
    finished before, nothing is changed. Raises ValueError or FileNotFoundError for a source that cannot be read,
    FileExistsError if `out` has other files or was begun with other arguments, and `Busy` (a ValueError) while another
    process writes into `out`.
    """
    if find_entry(source)[0].kind != "text":
        raise ValueError(f"{source!r} has no text to tokenise: name a corpus of documents, jsonl:PATH or hf:OWNER/NAME")
    check_spec(tokenizer)
    if shard_tokens < 1:
        raise ValueError(f"shard_tokens must be at least 1, got {shard_tokens}")
    opened = open_source(source, field)
    if split is not None and "" not in opened.streams:
        raise ValueError(f"{source!r} has its own splits ({', '.join(opened.streams)}): leave split out")
    if needs_text(tokenizer) and "" in opened.streams:
        raise ValueError(
            f"tokenizer {tokenizer!r} needs all of the text in advance, but {source!r} is a stream: use byte"
        )
    percent = parse_percent(split or USUAL_SPLIT, "split")
    built = build_tokenizer(tokenizer, load_corpus(source) if needs_text(tokenizer) else None)
    settings = {"source": source, "field": field, "split": split, "shard_tokens": shard_tokens, "tokenizer": tokenizer}
    with locked(out), atomic_write.naming(out):
        work = _Work(out, {**settings, "size": opened.size}, built, report, opened.unit)
        if work.finished is not None:
            return work.finished
        with progress_bar.work(opened.total, opened.unit):
            for own, stream in opened.streams.items():
                work.write(stream(), partial(split_by_hash, percent=percent) if not own else partial(_given, own))
        return work.finish()


def _given(split: str, document: str) -> str:
    return split


class _Work:
    """A folder of shards while it is written, with the progress that is stored in it.

    out: the folder. settings: the arguments of `write_shards`. report: as there. unit: what progress is counted in.
    shards: those that are complete, by split. place: how many documents of its stream each split has dealt with.
    """

    def __init__(
        self, out: Path, settings: PlainDict, tokenizer: PreTrainedTokenizerBase, report: Report | None, unit: str
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError("this tokenizer has no eos token, which shards need after every document")
        self.out, self.tokenizer, self.report = out, tokenizer, report
        self.settings = settings
        self.dtype = id_dtype(tokenizer)
        self.shards: dict[str, list[Shard]] = {}
        self.place: dict[str, int] = {}
        self.finished: Manifest | None = None
        self.unit, self.tokens = unit, 0  # of progress, and how many this call has encoded
        known = self._known()
        if known is None:
            out.mkdir(parents=True, exist_ok=True)
            self._save()
        elif known != settings:
            key = next(key for key in settings if known.get(key) != settings[key])
            raise FileExistsError(
                f"{str(out)!r} was started with {key} {known.get(key)!r}, not {settings[key]!r}; continue with the "
                "same setting, or name another folder"
            )

    def _known(self) -> PlainDict | None:
        """Return the settings with which this folder was begun, and restore its progress; None for a new folder.

        Raises FileExistsError for a folder with other files, and ValueError if the progress cannot be read.
        """
        if (self.out / MANIFEST).is_file():
            self.finished = open_shards(self.out).manifest
            self._tidy()  # remove what a call that was killed at its very end has left
            return self.finished.settings
        path = self.out / PROGRESS
        if not path.is_file():
            if self.out.exists() and not (self.out.is_dir() and all(map(_is_note, self.out.iterdir()))):
                raise FileExistsError(
                    f"{str(self.out)!r} exists already and nothing is overwritten; name another folder"
                )
            return None
        try:
            state = read_sealed(path)
            self.shards = {
                split: [from_dict(Shard, shard, split) for shard in shards] for split, shards in state["shards"].items()
            }
            self.place = {str(split): int(place) for split, place in state["place"].items()}
            self._tell_kept()
            return dict(state["settings"])
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(
                f"{str(path)!r} cannot be read ({error!r}); remove {str(self.out)!r} and start again"
            ) from None

    def _tell_kept(self) -> None:
        found = [
            f"{split}: {len(shards)} shards with {sum(shard.tokens for shard in shards):,} tokens"
            for split, shards in self.shards.items()
        ]
        progress_bar.say(f"continuing an interrupted call; kept are {', '.join(found) or 'no shards yet'}")

    def _save(self) -> None:
        shards = {split: [dataclasses.asdict(shard) for shard in shards] for split, shards in self.shards.items()}
        state = {"settings": self.settings, "place": self.place, "shards": shards}
        atomic_write.write_json(self.out / PROGRESS, sealed(state))

    def write(self, documents: Iterable[str], split_of: Callable[[str], str]) -> None:
        """Encode the documents of one stream that are not yet on disk, and write them to shards.

        split_of: returns the split of a document.
        """
        open_files: dict[str, _File] = {}
        try:
            for place, split, size, ids in self._encoded(documents, split_of):
                if split not in open_files:
                    open_files[split] = _File(self.out, f"{split}-{len(self.shards.get(split, [])):05}", self.dtype)
                open_files[split].add(ids, size)
                if open_files[split].tokens >= self.settings["shard_tokens"]:
                    self._close(split, open_files.pop(split), place + 1)
            for split, file in sorted(open_files.items()):
                self._close(split, file, place + 1)
        finally:
            for file in open_files.values():
                file.file.close()

    def _encoded(self, documents: Iterable[str], split_of: Callable[[str], str]) -> Iterator[tuple[int, str, int, Ids]]:
        """Yield place in the stream, split, bytes of text and ids (with eos) of each document not yet written.

        documents: the whole stream. split_of: returns the split of a document.
        """
        eos = np.array([self.tokenizer.eos_token_id], self.dtype)
        waiting: deque[tuple[int, str, int]] = deque()

        def wanted() -> Iterator[str]:
            for place, text in enumerate(documents):
                if text and place >= self.place.get(split := split_of(text), 0):
                    waiting.append((place, split, _bytes(text, place, self.settings["source"])))
                    yield text

        for ids in encode_each(self.tokenizer, wanted(), self.dtype):
            self.tokens += len(ids) + 1
            progress_bar.advance(self.unit, int(self.unit == ONE_BY_ONE), f"{self.tokens:,} tokens")
            yield *waiting.popleft(), np.concatenate((ids, eos))

    def _close(self, split: str, file: _File, place: int) -> None:
        self.shards.setdefault(split, []).append(file.close())
        self.place[split] = place
        self._save()
        if self.report is not None:
            done = self.shards[split]
            self.report(split, sum(shard.documents for shard in done), sum(shard.tokens for shard in done))

    def _tidy(self) -> None:
        (self.out / PROGRESS).unlink(missing_ok=True)
        for path in self.out.glob(".*.partial"):
            atomic_write.remove(path)

    def finish(self) -> Manifest:
        """Write the tokenizer and, last of all, the manifest, and return it.

        Raises ValueError if a split for training or validation has no text.
        """
        for split in ("train", "validation"):
            if split not in self.shards:
                raise ValueError(
                    f"{self.settings['source']!r} has no text for its split {split!r}; name other shares, such as "
                    "--split 90-10, or give more text"
                )
        partial_folder = atomic_write.partial_of(self.out / TOKENIZER)
        with atomic_write.naming(self.out / TOKENIZER):
            self.tokenizer.save_pretrained(partial_folder)
        atomic_write.replace_folder(partial_folder, self.out / TOKENIZER)
        definition = self.out / TOKENIZER / "tokenizer.json"
        if not definition.is_file():
            raise ValueError("shards need a tokenizer of the tokenizers library, which is saved as tokenizer.json")
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            settings=self.settings,
            tokenizer_sha256=file_sha256(definition),
            tokenizer_files={path.name: file_sha256(path) for path in sorted(definition.parent.iterdir())},
            vocab_size=len(self.tokenizer),
            dtype=self.dtype.name,
            splits=self.shards,
        )
        atomic_write.write_json(self.out / MANIFEST, dataclasses.asdict(manifest))
        self._tidy()
        return manifest


class _File:
    """The two files of one shard while it is written, under temporary names until it is complete."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any]) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.partial = folder / f".{name}{TOKENS}.partial"
        self.file = self.partial.open("wb")
        self.sha256 = hashlib.sha256()
        self.tokens = 0
        self.index: list[tuple[int, int]] = []

    def add(self, ids: Ids, size: int) -> None:
        """Append a document: its token ids, and `size`, the UTF-8 bytes of its text."""
        data = ids.astype(self.dtype, copy=False).tobytes()
        self.file.write(data)
        self.sha256.update(data)
        self.index.append((self.tokens, size))
        self.tokens += len(ids)

    def close(self) -> Shard:
        """Write where each document starts, rename both files, and return the shard's entry in the manifest."""
        _sync(self.file)
        index = np.array(self.index, INDEX).tobytes()
        aside = self.folder / f".{self.name}{DOCUMENTS}.partial"
        with aside.open("wb") as file:
            file.write(index)
            _sync(file)
        aside.replace(self.folder / f"{self.name}{DOCUMENTS}")
        self.partial.replace(self.folder / f"{self.name}{TOKENS}")
        return Shard(
            name=self.name,
            tokens=self.tokens,
            documents=len(self.index),
            bytes=sum(size for _, size in self.index),
            sha256=self.sha256.hexdigest(),
            documents_sha256=hashlib.sha256(index).hexdigest(),
        )


def _is_note(path: Path) -> bool:
    """Return whether this is the unfinished progress file of a call that was killed before it wrote anything else."""
    return path == atomic_write.partial_of(path.with_name(PROGRESS))


def _sync(file: BinaryIO) -> None:
    """Flush a file to disk and close it."""
    file.flush()
    os.fsync(file.fileno())
    file.close()


def _bytes(text: str, place: int, source: str) -> int:
    """Return the number of UTF-8 bytes of a text. Raises ValueError for lone surrogates, naming the document.

    place: index of the document in its stream. source: the name of the stream.
    """
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise ValueError(f"document {place} of {source!r} has a lone surrogate at character {error.start}") from None
