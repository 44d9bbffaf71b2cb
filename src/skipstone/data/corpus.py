"""A corpus: named splits of documents, read when they are asked for, and the two ways to split one."""

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
    """Text under a name. A split is a tuple of documents; a corpus that is one stream has one document a split.

    `readers` maps each split to what reads it. Reading waits for `documents`, so a corpus of which one split is absent
    still serves the others, and listing costs nothing.
    """

    name: str
    description: str
    licence: str
    readers: Mapping[str, Reader]

    @property
    def splits(self) -> tuple[str, ...]:
        return tuple(self.readers)

    def documents(self, split: str) -> Documents:
        """The documents of `split`, none of them empty.

        Raises ValueError for a split that this corpus does not have or that holds no text, FileNotFoundError when its
        file is neither here nor can be had.
        """
        if split not in self.readers:
            raise ValueError(unknown(f"split of corpus {self.name!r}", split, self.readers))
        documents = tuple(document for document in self.readers[split]() if document)
        if not documents:
            raise ValueError(f"corpus {self.name!r} has no text in its split {split!r}")
        return documents


def contiguous(read: Reader, percent: Percent) -> dict[str, Reader]:
    """Splits that follow each other in the text, cut at `percent` of its characters; a document may be cut in two.

    `percent` has two or three entries (train, validation, test) that sum to 100.
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
    """The characters [start, end) of the documents laid end to end, still cut into documents."""
    at = 0
    for document in documents:
        yield document[max(start - at, 0) : max(end - at, 0)]
        at += len(document)


def by_hash(read: Reader, percent: Percent = (90, 5, 5)) -> dict[str, Reader]:
    """Shares (train, validation and perhaps test, sum 100) by the SHA-256 of each document's text.

    A document's split depends on nothing but its text: adding documents moves none, and equal documents stay together.
    """
    read = cache(read)

    def part(split: str) -> Documents:
        return tuple(document for document in read() if split_by_hash(document, percent) == split)

    return {split: partial(part, split) for split in SPLITS[: len(percent)]}


def split_by_hash(document: str, percent: Percent) -> str:
    """The split that a document's text puts it into."""
    bucket = _bucket(document)
    return next(split for i, split in enumerate(SPLITS) if bucket < sum(percent[: i + 1]))


def _bucket(document: str) -> Fraction:
    """In [0, 100), in steps of a hundredth; whole per cents come from digits of their own."""
    digest = hashlib.sha256(document.encode("utf-8", "surrogatepass")).digest()
    hundredths, percent = divmod(int.from_bytes(digest[:8], "big"), 100)
    return percent + Fraction(hundredths % 100, 100)


def parse_percent(text: str, where: str) -> tuple[Fraction, ...]:
    """`"80-10-10"` -> (80, 10, 10), `"99.5-.5"` likewise, to hundredths.

    Raises ValueError unless it is two or three shares above zero that sum to 100.
    """
    parts = text.split("-")
    shares = tuple(Fraction(part) for part in parts if re.fullmatch(r"[0-9]+|[0-9]*\.[0-9]{1,2}", part))
    if len(shares) != len(parts) or len(shares) not in (2, 3) or min(shares) <= 0 or sum(shares) != 100:
        raise ValueError(f"{where}: {text!r} is not a split such as 90-10 or 80-10-10 (per cent, sum 100)")
    return shares
