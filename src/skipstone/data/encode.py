"""Encode documents as token ids, in one compact array.

Where a tokenizer maps each character or byte to an id, a table in NumPy gives the same ids about ten times as fast and
in little memory; tests require that these ids equal the tokenizer's own.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from skipstone.core.strict import PlainDict
from skipstone.data.ids import Ids, Stitched

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1 << 22  # characters at a time, to limit the memory of UTF-32
BATCH = 256  # documents at a time
LAST_CODE_POINT = 0x10FFFF
REMEMBERED = 1 << 23  # characters of a split up to which its ids are kept for the next run on the same text


@dataclass(frozen=True, kw_only=True, eq=False)
class Encoded:
    """The documents of a split as token ids, concatenated, with an eos token between any two documents.

    ids: (N,) for N tokens, uint16 or uint32, whichever fits the vocabulary, in memory or on disk. Splits that are read
    from shards on disk also have an eos after the last document. document_starts: (D,) int64, index of the first token
    of each of D documents, beginning with 0; an eos belongs to the document before it. document_bytes: (D,) int64,
    UTF-8 bytes of each document's text; an eos counts 0.
    """

    ids: Ids | Stitched
    document_starts: NDArray[np.int64]
    document_bytes: NDArray[np.int64]


def encode_documents(tokenizer: PreTrainedTokenizerBase, documents: Sequence[str]) -> Encoded:
    """Encode documents and concatenate them with an eos token between two of them.

    documents: the texts of one split. Special tokens written in a text ("<eos>") are encoded as ordinary text. Raises
    ValueError if there are several documents and the tokenizer has no eos token. Returns the ids with the places and
    sizes of the documents.
    """
    eos = tokenizer.eos_token_id
    if eos is None and len(documents) > 1:
        raise ValueError("this tokenizer has no eos token, which a corpus of several documents needs between them")
    dtype = id_dtype(tokenizer)
    parts: list[Ids] = []
    lengths: list[int] = []
    for ids in encode_each(tokenizer, documents, dtype):
        joint = [np.array([eos], dtype)] if len(lengths) < len(documents) - 1 else []
        parts += [ids, *joint]
        lengths.append(len(ids) + len(joint))
    return Encoded(
        ids=np.concatenate(parts) if parts else np.zeros(0, dtype),
        document_starts=np.cumsum([0, *lengths[:-1]], dtype=np.int64),
        document_bytes=np.array([len(text.encode()) for text in documents], np.int64),
    )


def id_dtype(tokenizer: PreTrainedTokenizerBase) -> np.dtype[Any]:
    """Return the dtype for the tokenizer's ids: uint16 if its vocabulary has at most 65,536 entries, else uint32."""
    return np.dtype("<u2" if len(tokenizer) <= 1 << 16 else "<u4")


def encode_each(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], dtype: np.dtype[Any]) -> Iterator[Ids]:
    """Yield the token ids of each document as a one-dimensional array of `dtype`, without special tokens.

    Special tokens that are written in a text are encoded as ordinary text. documents: they are read in batches, so they
    may be a stream. For byte and character tokenizers, a table lookup in NumPy gives the same ids about 10 times as
    fast as the tokenizer.
    """
    kind, table = _simple(tokenizer)
    if kind == "byte":
        return (np.frombuffer(text.encode(), np.uint8).astype(dtype) for text in documents)
    if table is not None:
        narrow = table.astype(dtype)
        return (_look_up(narrow, text) for text in documents)
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and isinstance(documents, tuple) and sum(map(len, documents)) <= REMEMBERED:
        return iter(_remembered(_Defined(tokenizer=tokenizer, definition=backend.to_str()), documents, dtype))
    return _call(tokenizer, documents, dtype)


@dataclass(frozen=True, kw_only=True)
class _Defined:
    """A key of a cache of encoded texts, which is equal for tokenizers with the same definition, such as copies of one.

    tokenizer: the tokenizer. definition: its tokenizer.json as text.
    """

    tokenizer: PreTrainedTokenizerBase = field(compare=False)
    definition: str


@lru_cache(maxsize=2)  # the train and validation text of models that are compared
def _remembered(given: _Defined, documents: tuple[str, ...], dtype: np.dtype[Any]) -> tuple[Ids, ...]:
    return tuple(_call(given.tokenizer, documents, dtype))


def _look_up(table: Ids, text: str) -> Ids:
    """Encode a text by a table [code point] of ids, without calling the tokenizer."""
    pieces = (text[at : at + CHUNK] for at in range(0, len(text), CHUNK))
    found = [table[np.frombuffer(piece.encode("utf-32-le"), np.dtype("<u4"))] for piece in pieces]
    return np.concatenate(found) if found else table[:0]


def _call(tokenizer: PreTrainedTokenizerBase, documents: Iterable[str], dtype: np.dtype[Any]) -> Iterator[Ids]:
    """Yield the token ids of each document as arrays of `dtype`, calling the tokenizer on batches of documents."""
    rest = iter(documents)
    while batch := list(islice(rest, BATCH)):
        encoded = tokenizer(batch, add_special_tokens=False, split_special_tokens=True, verbose=False)
        yield from (np.array(ids, dtype) for ids in encoded["input_ids"])


def _simple(tokenizer: PreTrainedTokenizerBase) -> tuple[str, NDArray[np.uint32] | None]:
    """Return ("byte", None), ("char", table of ids by code point) or ("", None), from the tokenizer's definition.

    A tokenizer is of the first two kinds if it has no normaliser, no merges, and no prefix or suffix on words, so that
    each byte or character is a token.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    state = json.loads(backend.to_str()) if backend is not None else {}
    model = state.get("model", {})
    plain = model.get("type") == "BPE" and not model["merges"] and state["normalizer"] is None
    plain = plain and all(token["special"] for token in state["added_tokens"])  # others match inside texts
    if not plain or model["continuing_subword_prefix"] or model["end_of_word_suffix"] or model["byte_fallback"]:
        return "", None
    return ("byte", None) if _is_byte(state) else ("char", _char_table(state))


def _is_byte(state: PlainDict) -> bool:
    from skipstone.data.tokenizers import byte_alphabet

    before = state["pre_tokenizer"] or {}
    exact = before.get("type") == "ByteLevel" and not before["use_regex"] and not before["add_prefix_space"]
    return exact and all(state["model"]["vocab"].get(char) == byte for byte, char in enumerate(byte_alphabet()))


def _char_table(state: PlainDict) -> NDArray[np.uint32] | None:
    model = state["model"]
    if state["pre_tokenizer"] is not None or model["unk_token"] not in model["vocab"] or model["fuse_unk"]:
        return None
    table = np.full(LAST_CODE_POINT + 1, model["vocab"][model["unk_token"]], np.uint32)
    for token, index in model["vocab"].items():
        if len(token) == 1:
            table[ord(token)] = index
    return table


def text_bytes(tokenizer: PreTrainedTokenizerBase, encoded: Encoded, tokens: int) -> int:
    """Return how many UTF-8 bytes of text the first `tokens` tokens of a split encode; an eos counts 0.

    tokenizer: the tokenizer that encoded the split. encoded: the split. tokens: a number of tokens, which may end
    within a document; the tokens of that document are then decoded to count their bytes.
    """
    ends = np.append(encoded.document_starts[1:], len(encoded.ids))
    whole = int(np.searchsorted(ends, tokens, side="right"))
    total = int(encoded.document_bytes[:whole].sum())
    start = int(ends[whole - 1]) if whole else 0
    rest = encoded.ids[start:tokens]
    if _simple(tokenizer)[0] == "byte":
        return total + int((rest < 256).sum())
    return total + len(tokenizer.decode(rest.tolist(), skip_special_tokens=True).encode())
