"""The registry of corpora by name. Importing it imports nothing heavy, because the command line lists it.

A new corpus is one function `(argument) -> Corpus` and one entry in `CORPORA`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from skipstone.core.strict import choose
from skipstone.data import installed, published, users
from skipstone.data.corpus import Corpus


@dataclass(frozen=True, kw_only=True)
class CorpusEntry:
    """An entry in the registry of corpora.

    summary: a description for lists. kind: "text" has documents, which a tokenizer encodes; "synthetic" generates rows
    of token ids; "mixed" puts such rows into the text of another corpus; "shards" has token ids on disk with their
    tokenizer. known: whether rows have a field `difficulty`, the depth that each token is known to need. load: a
    function that returns the corpus, given the part of its name after the colon ("" if there is none); None for corpora
    without text. argument: what is written after the colon, such as "PATH"; "" means that the name has no such part.
    required: whether the name must have that part. tokenizer: the default tokenizer; None if the user cannot choose
    one.
    """

    summary: str
    kind: Literal["text", "synthetic", "mixed", "shards"] = "text"
    known: bool = False
    load: Callable[[str], Corpus] | None = None
    argument: str = ""
    required: bool = False
    tokenizer: str | None = "byte"


def _distinct(argument: str) -> Corpus:
    from skipstone.data.distinct import distinct  # imports numpy, which a check of recipes does without

    return distinct(load_corpus(argument))


CORPORA: dict[str, CorpusEntry] = {
    "tiny-shakespeare": CorpusEntry(
        summary="1.1 MB of plays, one stream, cut 90-10",
        load=published.tiny_shakespeare,
        argument="80-10-10",
        tokenizer="char",
    ),
    "python-stdlib": CorpusEntry(
        summary="the running Python's own sources; on every machine",
        load=installed.python_stdlib,
        argument="99-0.5-0.5",
    ),
    "python-packages": CorpusEntry(
        summary="python-stdlib and the installed torch and transformers; over 100 MB",
        load=installed.python_packages,
        argument="99-0.5-0.5",
    ),
    "python-code": CorpusEntry(
        summary="all installed Python packages, split by package; on every machine",
        load=installed.python_code,
    ),
    "wikitext-2": CorpusEntry(summary="13 MB of word-tokenised Wikipedia articles", load=published.wikitext_2),
    "enwik8": CorpusEntry(summary="10^8 bytes of Wikipedia XML, cut 90M/5M/5M", load=published.enwik8),
    "gcide": CorpusEntry(summary="40 MB of dictionary prose, from Debian's dict-gcide", load=published.gcide),
    "text": CorpusEntry(summary="a text file or a folder of them", load=users.text, argument="PATH", required=True),
    "jsonl": CorpusEntry(
        summary="JSON objects with a text, one a line; a file or a folder of them",
        load=users.jsonl,
        argument="PATH",
        required=True,
    ),
    "hf": CorpusEntry(
        summary="a dataset of the Hugging Face hub, or a folder of its file formats",
        load=users.huggingface,
        argument="OWNER/NAME[/CONFIG]",
        required=True,
    ),
    "shards": CorpusEntry(
        summary="what skipstone prepare has written: token ids on disk, one source or several to blend",
        kind="shards",
        argument="FOLDER",
        required=True,
        tokenizer=None,
    ),
    "distinct": CorpusEntry(
        summary="a text corpus without passages that a later split nearly repeats",
        load=_distinct,
        argument="CORPUS",
        required=True,
    ),
    "reset-s3": CorpusEntry(
        summary="products in S3 since the last reset: needed depth is known",
        kind="synthetic",
        known=True,
        tokenizer=None,
    ),
    "switched-s3": CorpusEntry(
        summary="the same where only an earlier switch tells operations from fillers",
        kind="synthetic",
        known=True,
        tokenizer=None,
    ),
    "mixed": CorpusEntry(
        summary="a text corpus with spans of switched-s3 in half of its windows",
        kind="mixed",
        known=True,
        load=lambda argument: load_corpus(argument),
        argument="CORPUS",
        required=True,
    ),
    "copy": CorpusEntry(summary="repeat n symbols", kind="synthetic", tokenizer=None),
    "sort": CorpusEntry(summary="sort n symbols", kind="synthetic", tokenizer=None),
}


def find_entry(name: str) -> tuple[CorpusEntry, str]:
    """Return the registry entry for a corpus called `name` or `name:argument`, and the argument ("" if there is none).

    Raises ValueError for an unknown name (the message suggests the nearest), for an argument that is missing where one
    is required or after a colon, and for an argument of a corpus that accepts none.
    """
    head, colon, argument = str(name).partition(":")
    entry = choose("corpus", head, CORPORA)
    if colon and not entry.argument:
        raise ValueError(f"corpus {head!r} takes nothing after a colon, got {name!r}")
    if not argument and (entry.required or colon):
        raise ValueError(f"corpus {name!r} is incomplete: write {head}:{entry.argument}")
    return entry, argument


def knows_difficulty(name: str | None) -> bool:
    """Return whether rows of this corpus have a field `difficulty`, which says which tokens need depth; False for None.

    name: the corpus's name, with an argument after a colon where it has one. Raises ValueError for an unknown name.
    """
    return name is not None and find_entry(name)[0].known


def load_corpus(name: str) -> Corpus:
    """Return the corpus called `name` or `name:argument`; its text is not read before `Corpus.documents` is called.

    Raises ValueError for a name that is not in the registry, and for corpora without documents (synthetic ones and
    shards); FileNotFoundError if the path of `text:` or `jsonl:`, or the dataset of `hf:`, does not exist. Published
    files are found or downloaded only by `Corpus.documents`.
    """
    entry, argument = find_entry(name)
    if entry.load is None:
        what = "is synthetic" if entry.kind == "synthetic" else "is tokenised already"
        raise ValueError(f"corpus {name!r} {what}: it has rows (skipstone.data.prepare), not documents")
    return entry.load(argument)
