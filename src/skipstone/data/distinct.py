"""`distinct:CORPUS`: a text corpus without the passages of earlier splits that are nearly copied in later ones.

Copies between splits make a model look better the more text it reads. Documents are cut into passages of about 2,000
characters at line ends. A passage is dropped if more than a third of its 13-grams of words occur in a later split
(train before validation before test), so the test split stays whole. 13-grams are the measure of arXiv 2005.14165,
appendix C, which removes single collisions; the share keeps passages that have only a common licence header.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from functools import cache, lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from skipstone.data.corpus import SPLITS, Corpus, Documents

GRAM = 13  # words
MOST = 1 / 3  # largest share of a passage's 13-grams that may occur in later splits
PASSAGE = 2000  # characters
WORD = re.compile(r"\w+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)  # odd, so that no bit of a word's hash is lost

Grams = NDArray[np.uint64]


def distinct(corpus: Corpus) -> Corpus:
    """Return a copy of the corpus without the passages that nearly repeat in a later split (train < validation < test).

    A passage is about 2,000 characters that end at a line end. It is dropped if more than a third of its runs of 13
    words occur anywhere in the later splits; the last split stays whole. The copy reads the text when its documents are
    asked for.
    """
    splits = [split for split in SPLITS if split in corpus.readers]
    readers = {split: cache(partial(_kept, corpus, split, splits[i + 1 :])) for i, split in enumerate(splits)}
    return replace(
        corpus,
        name=f"distinct:{corpus.name}",
        description=f"{corpus.description}, near-copies removed",
        readers=readers,
    )


def _kept(corpus: Corpus, split: str, later: Sequence[str]) -> Documents:
    documents = corpus.documents(split)
    if not later:
        return documents
    known = np.unique(np.concatenate([grams(text) for name in later for text in corpus.documents(name)]))
    return tuple(drop_copies(documents, known))


def drop_copies(documents: Iterable[str], known: Grams) -> Iterator[str]:
    """Yield documents without the passages of which more than a third of the runs of 13 words are known.

    documents: the texts, which are cut into passages of about 2,000 characters at line ends. known: hashes of the known
    runs, as `grams` returns them, sorted. Documents of which nothing is left are not yielded.
    """
    for document in documents:
        kept = [passage for passage in passages(document) if share_known(grams(passage), known) <= MOST]
        if kept:
            yield "".join(kept)


def share_known(found: Grams, known: Grams) -> float:
    """Return the share of the hashes `found` that occur in `known`, from 0 to 1; 0 if either array is empty.

    Both are uint64 arrays with one axis, of any lengths; `known` must be sorted.
    """
    if not len(found) or not len(known):
        return 0.0
    at = np.minimum(np.searchsorted(known, found), len(known) - 1)
    return float((known[at] == found).mean())


def passages(document: str) -> Iterator[str]:
    """Divide a document into consecutive passages, each ending at the first line end after 2,000 characters."""
    start = 0
    while start < len(document):
        end = document.find("\n", start + PASSAGE)
        end = len(document) if end < 0 else end + 1
        yield document[start:end]
        start = end


def grams(text: str) -> Grams:
    """Return a 64-bit hash of every run of 13 consecutive words of a text, in order, as a uint64 array with one axis.

    A text of W words has W - 12 of them; for fewer than 13 words, the array is empty. Case, and everything between
    words, is ignored.
    """
    words = WORD.findall(text.lower())
    if len(words) < GRAM:
        return np.zeros(0, np.uint64)
    hashes = np.fromiter(map(_word, words), np.uint64, len(words))
    total = np.zeros(len(words) - GRAM + 1, np.uint64)
    for i in range(GRAM):
        total = total * MULTIPLIER + hashes[i : i + len(total)]
    return total


@lru_cache(maxsize=1 << 20)
def _word(word: str) -> int:
    data = word.encode("utf-8", "surrogatepass")
    return zlib.crc32(data) << 32 | zlib.crc32(data[::-1])
