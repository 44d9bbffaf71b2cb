"""Tokenizers by name: characters, bytes, byte pairs of the corpus, or any pretrained one.

All are Hugging Face tokenizers that are fully defined by their saved files, so that `AutoTokenizer.from_pretrained`
loads them without this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from skipstone.core import checksums
from skipstone.core.hub import why_unreachable
from skipstone.core.source_files import read_tokenizer
from skipstone.core.strict import unknown
from skipstone.data.corpus import Corpus
from skipstone.data.fetch import offline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

UNK, EOS, PAD = "<unk>", "<eos>", "<pad>"
KINDS = ("char", "byte", "bpe:SIZE", "pretrained:NAME_OR_PATH")
SMALLEST, LARGEST = 258, 1 << 16  # sizes of `bpe`: the bytes and two special tokens; what uint16 holds
TRAINED_ON = 1 << 22  # characters of the training text from which merges are learnt, at most


def check_spec(spec: str) -> None:
    """Raise ValueError unless `spec` is `char`, `byte`, `bpe:SIZE` or `pretrained:NAME_OR_PATH`.

    SIZE is a number of ids from 258 to 65,536; NAME is the name of a repository on the Hugging Face hub.
    """
    if spec in ("char", "byte") or (spec.startswith("pretrained:") and spec != "pretrained:"):
        return
    if spec.startswith("bpe:"):
        _size(spec)
        return
    raise ValueError(unknown("tokenizer", spec, KINDS))


def _size(spec: str) -> int:
    """Return SIZE of the tokenizer name `bpe:SIZE`. Raises ValueError unless it is an integer in the allowed range."""
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit() and SMALLEST <= int(size) <= LARGEST):
        raise ValueError(
            f"tokenizer bpe:SIZE has a size from {SMALLEST} to {LARGEST:,}, such as bpe:1024, got {spec!r}"
        )
    return int(size)


def needs_text(spec: str) -> bool:
    """Return whether building the tokenizer that `spec` names reads the corpus's text, as `char` and `bpe:SIZE` do."""
    return spec == "char" or spec.startswith("bpe:")


def build_tokenizer(spec: str, corpus: Corpus | None) -> PreTrainedTokenizerBase:
    """Build the tokenizer that `spec` names: `char`, `byte`, `bpe:SIZE` or `pretrained:NAME_OR_PATH`.

    `char`: one id for every character of the corpus's train and validation text, by code point from 0, then `<unk>`,
    `<eos>`, `<pad>`; unseen characters become `<unk>`. `byte`: ids 0 to 255 are the bytes of UTF-8, 256 is `<eos>`, 257
    is `<pad>`; it represents any text. `bpe:SIZE`: the 256 bytes, then the pairs that byte-level BPE merges in the
    corpus's train text, then `<eos>` and `<pad>`; at most SIZE ids, fewer for short texts; it represents any text, too.
    `pretrained:NAME_OR_PATH`: the tokenizer as published, without additions. corpus: needed for `char` and `bpe:SIZE`
    only. Raises ValueError for any other spec, FileNotFoundError if a pretrained tokenizer cannot be loaded.
    """
    check_spec(spec)
    if spec == "char":
        assert corpus is not None
        seen = {char for split in ("train", "validation") for text in corpus.documents(split) for char in set(text)}
        return char_tokenizer(seen)
    if spec.startswith("bpe:"):
        assert corpus is not None
        return bpe_tokenizer(corpus.documents("train"), _size(spec))
    return byte_tokenizer() if spec == "byte" else _pretrained(spec.removeprefix("pretrained:"))


def char_tokenizer(characters: set[str]) -> PreTrainedTokenizerBase:
    """Build a tokenizer with one id per character, in the order of code points, then `<unk>`, `<eos>` and `<pad>`.

    characters: the characters that get an id. The tokenizer is a BPE without merges, which is faster than splitting by
    a pattern.
    """
    from tokenizers import Tokenizer, decoders, models

    vocabulary = {char: i for i, char in enumerate(sorted(characters))}
    vocabulary[UNK] = len(vocabulary)
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token=UNK))
    backend.decoder = decoders.Fuse()
    return _wrap(backend, unk_token=UNK)


def byte_tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer with one id per byte of UTF-8 (0 to 255), then `<eos>` (256) and `<pad>` (257)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    backend = Tokenizer(models.BPE({char: byte for byte, char in enumerate(byte_alphabet())}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap(backend)


def bpe_tokenizer(documents: Iterable[str], size: int) -> PreTrainedTokenizerBase:
    """Train a byte-level BPE tokenizer on documents and return it.

    documents: texts; only their first 4,194,304 characters (`TRAINED_ON`) are read. size: the largest number of ids,
    `<eos>` and `<pad>` included. Text is split into words as GPT-2 does, and no merge crosses two words. Training on
    equal texts gives equal ids.
    """
    from tokenizers import Tokenizer

    return _wrap(Tokenizer.from_str(_merges(tuple(_first(documents, TRAINED_ON)), size)))


@lru_cache(maxsize=1)  # models that are compared learn from the same text
def _merges(texts: tuple[str, ...], size: int) -> str:
    """Return the definition of a byte-level BPE tokenizer with at most `size - 2` ids, as JSON."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size - 2, min_frequency=2, initial_alphabet=byte_alphabet(), show_progress=False
    )
    backend.train_from_iterator(texts, trainer)
    return str(backend.to_str())


def _first(documents: Iterable[str], most: int) -> Iterator[str]:
    """Yield the first documents, up to `most` characters in all; the last one may be cut."""
    for text in documents:
        yield text[:most]
        most -= len(text)
        if most <= 0:
            return


def byte_alphabet() -> list[str]:
    """Return the 256 characters by which the tokenizers library writes bytes in a vocabulary (ByteLevel).

    Printable Latin-1 characters stand for themselves, all other bytes for U+0100, U+0101, ... in order.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _wrap(backend: Any, **specials: str) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=EOS,
        pad_token=PAD,
        padding_side="left",  # for batched generation; `collate` pads training rows
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **specials,
    )


def load_saved(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer saved in a folder, without running any code from the folder.

    Raises `Damaged` (a ValueError) if a file differs from the folder's recorded hashes, and ValueError, naming the
    file or the folder, if the tokenizer cannot be read.
    """
    checksums.check(folder, leave_out=".safetensors")
    return read_tokenizer(folder, local_files_only=True)


def _pretrained(name: str) -> PreTrainedTokenizerBase:
    if not offline() and not Path(name).is_dir() and (reason := why_unreachable(name)):
        raise FileNotFoundError(
            f"tokenizer pretrained:{name} is no folder here and not in the hub's cache, and {reason}"
        )
    try:
        return read_tokenizer(name, local_files_only=offline())
    except ValueError as error:
        raise FileNotFoundError(f"tokenizer pretrained:{name} could not be loaded: {error}") from error
