"""`Corpus`: named splits of documents, read when they are needed; splits by documents' hashes or by place in a text."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, partial

from skipstone.core.strict import unknown

SPLITS = ("train", "validation", "test")
Documents = tuple[str, ...]
Reader = Callable[[], Documents]
Percent = Sequence[int | Fraction]


@dataclass(frozen=True, kw_only=True, eq=False)
class Corpus:
    """A named corpus of text, divided into splits; each split is a tuple of documents (strings).

    A corpus that is one continuous text has one document per split. name: its name, such as "enwik8" or "text:PATH".
    description, licence: texts of one line each. readers: for each split ("train", "validation", perhaps "test"), a
    function without arguments that reads and returns its documents. `documents` calls only the function of the split
    that it is asked for, so a split can be read although the files of another are missing.
    """

    name: str
    description: str
    licence: str
    readers: Mapping[str, Reader]

    @property
    def splits(self) -> tuple[str, ...]:
        """The names of the splits, out of "train", "validation" and "test"."""
        return tuple(self.readers)

    def documents(self, split: str) -> Documents:
        """Read and return the documents of a split, a tuple of strings; empty documents are left out.

        Raises ValueError for a split that the corpus does not have or that contains no text, and FileNotFoundError if
        the file of the split is not on this machine and cannot be downloaded.
        """
        if split not in self.readers:
            raise ValueError(unknown(f"split of corpus {self.name!r}", split, self.readers))
        documents = tuple(document for document in self.readers[split]() if document)
        if not documents:
            raise ValueError(f"corpus {self.name!r} has no text in its split {split!r}")
        return documents


def contiguous(read: Reader, percent: Percent) -> dict[str, Reader]:
    """Divide a text into consecutive splits by numbers of characters; return the reader of each split, by name.

    The text is the documents of `read` one after another, and a document may be cut in two. A reader is a function
    without arguments that returns the documents of its split. read: returns all documents, in order; it is called once.
    percent: per cent of the characters for train, validation and optionally test, in this order; the sum is 100.
    """
    read = cache(read)
    ends = [sum(percent[: i + 1]) for i in range(len(percent))]

    def part(low: int | Fraction, high: int | Fraction) -> Documents:
        documents = read()
        total = sum(map(len, documents))
        return tuple(_between(documents, total * low // 100, total * high // 100))

    spans = zip(SPLITS, [0, *ends], ends, strict=False)
    return {split: partial(part, low, high) for split, low, high in spans}


def _between(documents: Documents, start: int, end: int) -> Iterable[str]:
    """Yield the characters [start, end) of the concatenated documents, still divided into documents."""
    at = 0
    for document in documents:
        yield document[max(start - at, 0) : max(end - at, 0)]
        at += len(document)


def by_hash(read: Reader, percent: Percent = (90, 5, 5)) -> dict[str, Reader]:
    """Divide documents into splits by the SHA-256 of their text; return the reader of each split, by name.

    A document's split depends on its text alone: adding documents moves none, and equal documents stay together. A
    reader is a function without arguments that returns the documents of its split. read: returns all documents; it is
    called once. percent: expected per cent of the documents for train, validation and optionally test, in this order;
    the sum is 100.
    """
    read = cache(read)

    def part(split: str) -> Documents:
        return tuple(document for document in read() if split_by_hash(document, percent) == split)

    return {split: partial(part, split) for split in SPLITS[: len(percent)]}


def split_by_hash(document: str, percent: Percent) -> str:
    """Return the split of a document ("train", "validation" or "test"), determined by the SHA-256 of its text.

    percent: expected per cent of the documents for each split, in this order; the sum is 100.
    """
    bucket = _bucket(document)
    return next(split for i, split in enumerate(SPLITS) if bucket < sum(percent[: i + 1]))


def _bucket(document: str) -> Fraction:
    """Return a number in [0, 100) in steps of a hundredth, determined by the SHA-256 of a document's text."""
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    hundredths, percent = divmod(int.from_bytes(digest[:8], "big"), 100)
    return percent + Fraction(hundredths % 100, 100)


def parse_percent(text: str, where: str) -> tuple[Fraction, ...]:
    """Parse per cent such as "80-10-10" or "99.5-.5" of train, validation and optionally test, as exact fractions.

    The result has one `Fraction` for each number, and their sum is 100. text: per cent with at most two decimals,
    separated by "-". where: the name shown in errors. Raises ValueError unless these are two or three positive numbers
    with the sum 100.
    """
    parts = text.split("-")
    shares = tuple(Fraction(part) for part in parts if re.fullmatch(r"[0-9]+|[0-9]*\.[0-9]{1,2}", part))
    if len(shares) != len(parts) or len(shares) not in (2, 3) or min(shares) <= 0 or sum(shares) != 100:
        raise ValueError(f"{where}: {text!r} is not a split such as 90-10 or 80-10-10 (per cent, sum 100)")
    return shares
