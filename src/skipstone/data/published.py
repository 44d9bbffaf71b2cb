"""Corpora that are published files, with their address, size and checksum."""

from __future__ import annotations

import gzip
import re
from functools import partial

from skipstone.data.corpus import Corpus, Documents, by_hash, contiguous, parse_percent
from skipstone.data.fetch import SourceFile, locate

SHAKESPEARE = SourceFile(
    path="tiny-shakespeare/input.txt",
    size=1_115_394,
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    url="https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
)

_WIKITEXT = "https://raw.githubusercontent.com/pytorch/examples/main/word_language_model/data/wikitext-2"
WIKITEXT = {
    "train": SourceFile(
        path="wikitext-2/train.txt",
        size=10_797_148,
        sha256="9e9fa1ad55b1c2c95b08e37dd8e653f638fac2c6de904b79e813611eefbc985f",
        url=f"{_WIKITEXT}/train.txt",
    ),
    "validation": SourceFile(
        path="wikitext-2/valid.txt",
        size=1_121_681,
        sha256="f0737ed31fc1329026e95cb8b98e19c2a182c39c240ab909dc31abf2f8af58e8",
        url=f"{_WIKITEXT}/valid.txt",
    ),
    "test": SourceFile(
        path="wikitext-2/test.txt",
        size=1_256_449,
        sha256="d790b833ef8cf03a90db7bf1271b7520b83c45ce07ba3c1a9699df81e239eca0",
        url=f"{_WIKITEXT}/test.txt",
    ),
}

ENWIK8 = SourceFile(
    path="enwik8/enwik8",
    size=100_000_000,
    sha256="2b49720ec4d78c3c9fabaee6e4179a5e997302b3a70029f30f2d582218c024a8",
    url="http://mattmahoney.net/dc/enwik8.zip",
    member="enwik8",
    download_size=36_445_475,
)
ENWIK8_CUTS = (90_000_000, 95_000_000)  # bytes

GCIDE = SourceFile(
    path="gcide/gcide.dict.dz",
    system=("/usr/share/dictd/gcide.dict.dz",),
    hint="install Debian's package dict-gcide (apt-get install dict-gcide), or put its file there",
)


def tiny_shakespeare(argument: str, source: SourceFile = SHAKESPEARE) -> Corpus:
    """Return the corpus tiny-shakespeare, one continuous text, cut into 90 % train and 10 % validation by default.

    argument: another division in per cent, "80-20" for train and validation or "80-10-10" for train, validation and
    test; "" means the default. Raises ValueError if it is not such a division. source: the file to read.
    """
    percent = parse_percent(argument or "90-10", "corpus tiny-shakespeare")
    return Corpus(
        name="tiny-shakespeare",
        description="1.1 MB of Shakespeare's plays, from karpathy/char-rnn",
        licence="public domain text",
        readers=contiguous(partial(_stream, source), percent),
    )


def wikitext_2(argument: str, sources: dict[str, SourceFile] = WIKITEXT) -> Corpus:
    """Return the corpus WikiText-2: word-tokenised text with `<unk>` for rare words, one document per split.

    argument: not used. sources: the file of each split ("train", "validation", "test").
    """
    return Corpus(
        name="wikitext-2",
        description="Wikipedia articles, tokenised into words, as in pytorch/examples",
        licence="CC BY-SA 3.0",
        readers={split: partial(_stream, source) for split, source in sources.items()},
    )


def enwik8(argument: str, source: SourceFile = ENWIK8, cuts: tuple[int, int] = ENWIK8_CUTS) -> Corpus:
    """Return the corpus enwik8, cut into train, validation and test at 90 and 95 million of its 100 million bytes.

    A character that lies across a cut belongs to the later split. argument: not used. source: the file to read. cuts:
    the two positions at which to cut, in bytes.
    """
    spans = {"train": (0, cuts[0]), "validation": cuts, "test": (cuts[1], None)}
    return Corpus(
        name="enwik8",
        description="the first 10^8 bytes of English Wikipedia's XML dump of 2006-03-03",
        licence="GFDL / CC BY-SA (Wikipedia)",
        readers={split: partial(_span, source, low, high) for split, (low, high) in spans.items()},
    )


def gcide(argument: str, source: SourceFile = GCIDE) -> Corpus:
    """Return the GCIDE dictionary as a corpus: each entry is a document, assigned to a split by the hash of its text.

    The splits have about 90, 5 and 5 % of the entries, and every letter of the alphabet is in each. argument: not used.
    source: the file to read.
    """
    return Corpus(
        name="gcide",
        description="the Collaborative International Dictionary of English, from Debian's dict-gcide (40 MB)",
        licence="GPL-2.0-or-later",
        readers=by_hash(partial(_entries, source)),
    )


def _stream(source: SourceFile) -> Documents:
    return (locate(source).read_bytes().decode(),)


def _span(source: SourceFile, low: int, high: int | None) -> Documents:
    data = locate(source).read_bytes()
    return (data[_boundary(data, low) : None if high is None else _boundary(data, high)].decode(),)


def _boundary(data: bytes, at: int) -> int:
    """Return `at`, moved back to the first byte of the UTF-8 character that contains it."""
    while 0 < at < len(data) and data[at] & 0xC0 == 0x80:
        at -= 1
    return at


def _entries(source: SourceFile) -> Documents:
    """Return the dictionary's entries as documents; an entry begins in the first column after an empty line.

    Metadata (entries named `00-database-...`) are left out.
    """
    text = gzip.decompress(locate(source).read_bytes()).decode("cp1252", "replace")  # ASCII but for a few stray bytes
    entries = re.split(r"\n\s*\n(?=\S)", text.strip("\n"))
    return tuple(entry + "\n" for entry in entries if not entry.startswith("00-database"))
