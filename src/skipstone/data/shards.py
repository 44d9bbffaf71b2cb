"""Tokenised shards on disk: the manifest, and reading by memory mapping.

A folder of shards, written by `sharding.py`:

    manifest.json                 the contents, with the SHA-256 of every other file; written last
    tokenizer/                    Hugging Face's format
    train-00000.tokens            token ids, little-endian uint16 or uint32, an eos after every document
    train-00000.documents         little-endian int64 [D, 2]: start of each document, and bytes of its text

Ids are memory-mapped: rows are read when they are needed, and the operating system caches what fits into memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from skipstone.core.checksums import file_sha256
from skipstone.core.plain_text import parse_json
from skipstone.core.strict import PlainDict, from_dict, is_folder_name, unknown
from skipstone.data.encode import Encoded
from skipstone.data.ids import Stitched
from skipstone.data.tokenizers import load_saved

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMAT_VERSION = 1
MANIFEST, TOKENIZER = "manifest.json", "tokenizer"
TOKENS, DOCUMENTS = ".tokens", ".documents"  # suffixes of a shard's files
DTYPES: dict[str, np.dtype[Any]] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
INDEX = np.dtype("<i8")
AGAIN = "make the shards again with skipstone prepare"


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One shard as the manifest describes it: a file with token ids and a file with the documents' start positions.

    name: the name of both files without their suffixes, .tokens and .documents. tokens, documents: how many tokens and
    documents the shard has. bytes: the number of UTF-8 bytes of its text. sha256: SHA-256 of the file with token ids,
    in hexadecimal. documents_sha256: SHA-256 of the file with document starts. Raises ValueError for a name with a path
    in it, and for numbers out of range.
    """

    name: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    documents_sha256: str

    def __post_init__(self) -> None:
        if not is_folder_name(self.name):
            raise ValueError(f"{self.name!r} is no name of a file within the folder")
        for name in ("tokens", "documents", "bytes"):
            if not 0 <= getattr(self, name) < 1 << 60:
                raise ValueError(f"{name} of {self.name!r} must lie in 0 to 2^60, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """The description of a folder of shards, stored in its manifest.json.

    format_version: version of the file format. settings: the arguments of `write_shards` by name (source, field, split,
    shard_tokens, tokenizer), and `size`, the bytes of the files read. tokenizer_sha256: SHA-256 of
    tokenizer/tokenizer.json, in hexadecimal. vocab_size: number of ids. dtype: the dtype of the ids, "uint16" or
    "uint32". splits: the shards of each split, in order. tokenizer_files: SHA-256 of every file of the tokenizer by
    name; empty in manifests of earlier releases.
    """

    format_version: int
    settings: PlainDict
    tokenizer_sha256: str
    vocab_size: int
    dtype: str
    splits: dict[str, list[Shard]]
    tokenizer_files: dict[str, str] = field(default_factory=dict)

    def total(self, split: str, what: str) -> int:
        """Return a sum over the shards of a split.

        split: its name, such as "train". what: the field of `Shard` to add up: "tokens", "documents" or "bytes".
        """
        return sum(getattr(shard, what) for shard in self.splits[split])


@dataclass(frozen=True, kw_only=True, eq=False)
class ShardSet:
    """An opened folder of shards.

    folder: its path. manifest: its parsed manifest. sha256: SHA-256 of manifest.json, which in turn contains the hashes
    of all other files.
    """

    folder: Path
    manifest: Manifest
    sha256: str

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer with which the shards were made, from the subfolder `tokenizer`.

        Raises ValueError if its files cannot be read.
        """
        return load_saved(self.folder / TOKENIZER)

    def encoded(self, split: str) -> Encoded:
        """Return the token ids of a split with the places of its documents; the ids stay on disk.

        All files of the split are read once, to compare their SHA-256 with the manifest. Raises ValueError for a split
        that does not exist, and for a file that is absent or differs from the manifest.
        """
        if split not in self.manifest.splits:
            raise ValueError(unknown(f"split of shards {str(self.folder)!r}", split, self.manifest.splits))
        shards = self.manifest.splits[split]
        check(self.folder, self.manifest, [split])
        dtype = DTYPES[self.manifest.dtype]
        ids = Stitched([np.memmap(self.folder / f"{shard.name}{TOKENS}", dtype, "r") for shard in shards])
        index = [np.fromfile(self.folder / f"{shard.name}{DOCUMENTS}", INDEX).reshape(-1, 2) for shard in shards]
        for shard, part in zip(shards, index, strict=True):
            if len(part) and (part[0, 0] != 0 or (np.diff(part[:, 0]) <= 0).any() or part[-1, 0] >= shard.tokens):
                raise ValueError(f"{self.folder / shard.name}{DOCUMENTS} names documents that are not there; {AGAIN}")
        starts = [part[:, 0] + start for part, start in zip(index, ids.starts, strict=True)]
        return Encoded(
            ids=ids,
            document_starts=np.concatenate(starts).astype(np.int64),
            document_bytes=np.concatenate([part[:, 1] for part in index]).astype(np.int64),
        )


def open_shards(folder: Path) -> ShardSet:
    """Open a folder of shards: read its manifest and check the tokenizer's files against it, but read no token ids.

    Raises FileNotFoundError if the folder has no manifest (writing has not finished); ValueError for a manifest in
    another format, and for a file of the tokenizer that is absent or differs from the manifest.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise FileNotFoundError(f"{str(folder)!r} holds no finished shards ({MANIFEST} is absent); {AGAIN}")
    text = path.read_bytes()
    try:
        manifest = _manifest(parse_json(text))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{path} is not a manifest of shards ({error}); {AGAIN}") from None
    if manifest.format_version != FORMAT_VERSION or manifest.dtype not in DTYPES:
        raise ValueError(
            f"{path}: format_version {manifest.format_version} with {manifest.dtype} is not known to this release, "
            f"which reads {FORMAT_VERSION} with {' or '.join(DTYPES)}"
        )
    _compare(folder / TOKENIZER / "tokenizer.json", None, manifest.tokenizer_sha256)
    for name, sha256 in manifest.tokenizer_files.items():
        if Path(name).name != name:
            raise ValueError(f"{path} names {name!r}, which is no file of {TOKENIZER}/; {AGAIN}")
        _compare(folder / TOKENIZER / name, None, sha256)
    return ShardSet(folder=folder, manifest=manifest, sha256=hashlib.sha256(text).hexdigest())


def _manifest(values: Any) -> Manifest:
    splits = {split: [from_dict(Shard, shard, split) for shard in shards] for split, shards in values["splits"].items()}
    return from_dict(Manifest, {**values, "splits": splits})


def open_sources(folder: Path) -> dict[str, ShardSet]:
    """Open a folder of shards, or a folder that contains several such folders; return them by folder name.

    Manifests are read and the files of the tokenizers checked, but no token ids are read. Raises FileNotFoundError if
    there is no such folder or it has no manifest, and ValueError for a manifest in another format, a tokenizer file
    that differs from the manifest, and folders made with different tokenizers.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"corpus shards:FOLDER: there is no folder {str(folder)!r}")
    inside = sorted(path.parent for path in folder.glob(f"*/{MANIFEST}"))
    several = inside and not (folder / MANIFEST).is_file()
    opened = {path.name: open_shards(path) for path in (inside if several else [folder.resolve()])}
    first, *others = opened
    for other in others:
        if opened[other].manifest.tokenizer_sha256 != opened[first].manifest.tokenizer_sha256:
            raise ValueError(f"shards {str(folder)!r}: {first!r} and {other!r} were made with different tokenizers")
    return opened


def fingerprint(sets: Mapping[str, ShardSet]) -> str:
    """Return one SHA-256 over the names and manifests of all folders of shards, in hexadecimal.

    sets: the opened folders by name; their order does not matter.
    """
    return hashlib.sha256("".join(f"{name} {sets[name].sha256}\n" for name in sorted(sets)).encode()).hexdigest()


def check(folder: Path, manifest: Manifest, splits: Sequence[str]) -> None:
    """Read all files of some splits; raise ValueError for the first that is absent or not as the manifest says.

    It compares sizes and SHA-256. folder: where the files are. manifest: the description of the folder. splits: names
    of the splits, such as ["train"].
    """
    itemsize = DTYPES[manifest.dtype].itemsize
    for shard in (shard for split in splits for shard in manifest.splits[split]):
        _compare(folder / f"{shard.name}{TOKENS}", shard.tokens * itemsize, shard.sha256)
        _compare(folder / f"{shard.name}{DOCUMENTS}", shard.documents * 2 * INDEX.itemsize, shard.documents_sha256)


def _compare(path: Path, size: int | None, sha256: str) -> None:
    if not path.is_file():
        raise ValueError(f"{path} is named in {MANIFEST} and is not there; {AGAIN}")
    actual = path.stat().st_size
    if size is not None and actual != size:
        raise ValueError(f"{path} is damaged: it has {actual} bytes, {MANIFEST} says {size}; {AGAIN}")
    if (digest := file_sha256(path)) != sha256:
        raise ValueError(f"{path} is damaged: its SHA-256 is {digest}, {MANIFEST} says {sha256}; {AGAIN}")
