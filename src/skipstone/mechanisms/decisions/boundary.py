"""A decision that reads token ids: keep the tokens at which a word ends or begins.

    boundary_i = id_i is in a set of ids                                    (white space and punctuation, for bytes)
    kept_i     = boundary_i and not boundary_(i-1)                          at: first
                 boundary_i                                                 at: every
                 boundary_(i-1) and not boundary_i                          at: after

and always the first token of a document; during a warm-up of the capacity also other tokens, fewer and fewer, by a
fixed pattern of positions. With bytes and `at: first`, it is the fixed rule of SpaceByte (Slagle 2024,
arXiv 2404.14408): the kept position has read the character that ends a word and predicts the first byte of the next
one. There is no router; how many tokens are kept is up to the text. The decision needs the token itself and the one
before it, so it is causal and the same in training and generation. The decoder hands the ids to mechanisms in
`Tokens.state` (`IDS`, `IDS_BEFORE`) if one of them reads them, and keeps the last id of each row in the cache.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.core.tokens import IDS, IDS_BEFORE, Tokens
from skipstone.mechanisms.decisions.base import Decision
from skipstone.mechanisms.decisions.controls import hashed
from skipstone.mechanisms.schedules import Capacity

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LETTERS_AND_DIGITS = {*b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"}
CONTINUATION = range(0x80, 0xC0)  # bytes of UTF-8 inside a character
BYTES_AND_END = 257  # the ids of our byte tokenizer without its padding: 256 ends a document
LARGEST_ID = 1 << 24
EXPECTED_SHARE = 0.2  # of the bytes of text that are kept with `at: first`: .13 in Python code, .165 to .2 in English


@dataclass(frozen=True, kw_only=True)
class Boundaries:
    """The options of decision "boundary", which keeps tokens at word boundaries.

    ids: the boundary tokens. "bytes": for the byte tokenizer, every byte but letters, digits and UTF-8 continuation
    bytes; "tokenizer": derived from the tokenizer when a training begins (`boundary_ids`), which stores the list here;
    or a list of ids and inclusive ranges, such as [10, "32-47"]. at: which tokens are kept around a run of boundary
    tokens: "first" (of the run), "every" (token of the run), or "after" (the token that follows the run). Raises
    ValueError for an empty list and for invalid ids or ranges.
    """

    ids: Literal["bytes", "tokenizer"] | list[int | str] = "bytes"
    at: Literal["first", "every", "after"] = "first"

    def __post_init__(self) -> None:
        if not self.ids:
            raise ValueError("ids lists no boundary token; name at least one, or bytes, or tokenizer")
        if not isinstance(self.ids, str):
            listed_ids(self.ids)

    def resolved(self) -> list[int]:
        """Return the ids of the boundary tokens, ascending; [] as long as `ids` is "tokenizer"."""
        if self.ids == "tokenizer":
            return []
        return byte_boundaries() if isinstance(self.ids, str) else listed_ids(self.ids)


def byte_boundaries() -> list[int]:
    """Return the boundary ids of the byte tokenizer, ascending.

    These are all bytes except letters, digits and UTF-8 continuation bytes, and 256, the id that ends a document.
    """
    return [i for i in range(BYTES_AND_END) if i not in LETTERS_AND_DIGITS and i not in CONTINUATION]


def listed_ids(items: Sequence[int | str]) -> list[int]:
    """Return the token ids in `items`, ids and inclusive ranges such as "32-47", ascending and each once.

    Raises ValueError for an item that is neither, for a descending range and for ids of 2^24 or more.
    """
    found: set[int] = set()
    for item in items:
        first, dash, last = str(item).strip().partition("-")
        if isinstance(item, bool) or not first.isdecimal() or (dash and not last.isdecimal()):
            raise ValueError(f'ids must hold token ids and ranges such as "32-47", got {item!r}')
        low, high = int(first), int(last if dash else first)
        if low > high or high >= LARGEST_ID:
            raise ValueError(f"ids must be ascending ranges of ids below {LARGEST_ID:,}, got {item!r}")
        found |= {*range(low, high + 1)}
    return sorted(found)


def as_ranges(ids: Sequence[int]) -> list[int | str]:
    """Return ascending ids as a short list of ids and inclusive ranges such as "32-47", the inverse of `listed_ids`."""
    runs: list[list[int]] = []
    for i in ids:
        if runs and runs[-1][1] == i - 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    return [low if low == high else f"{low}-{high}" for low, high in runs]


def boundary_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int | str], Literal["first", "every"]]:
    """Find the boundary tokens of a tokenizer: special tokens, and those that begin with white space or punctuation.

    Return the ids, as a list that `Boundaries.ids` accepts, and the fitting `Boundaries.at`: "every" if some token
    holds white space and the word after it, so that each boundary token begins a word; else "first", as for bytes.
    """
    special, found, whole_words = {*tokenizer.all_special_ids}, [], False
    for i in range(len(tokenizer)):
        text = tokenizer.decode([i], skip_special_tokens=False, clean_up_tokenization_spaces=False)
        raw = tokenizer.convert_ids_to_tokens(i) or text
        spaced = raw[:1] in ("\u0120", "\u2581") or text[:1].isspace()  # how byte-level BPE and SentencePiece write it
        if i in special or spaced or (text and not text[0].isalnum() and text[0] != "\ufffd"):
            found.append(i)
            whole_words |= i not in special and spaced and any(c.isalnum() for c in text)
    return as_ranges(found), "every" if whole_words else "first"


def with_boundary_ids(entries: Sequence[PlainDict], tokenizer: PreTrainedTokenizerBase) -> list[PlainDict]:
    """Return a list of entries of `mechanisms` in which `boundary.ids: tokenizer` is replaced by the tokenizer's ids.

    entries: mappings as in `SkipstoneConfig.mechanisms`, which are not changed. Where such an entry gives no
    `boundary.at`, "every" or "first" is filled in, whichever fits the tokenizer (`boundary_ids`). Changed entries are
    copies.
    """
    found: list[PlainDict] = []
    for entry in entries:
        wanted = entry.get("boundary") if isinstance(entry, dict) else None
        if isinstance(wanted, dict) and wanted.get("ids") == "tokenizer":
            ids, at = boundary_ids(tokenizer)
            entry = {**entry, "boundary": {"at": at, **wanted, "ids": ids}}
        found.append(entry)
    return found


class Boundary(Decision):
    """A decision that keeps tokens at word boundaries, recognised by their ids, and each document's first token.

    capacity: has an effect only during its warm-up, if it has one: fewer and fewer other tokens are then kept as well.
    width: not used. boundary: the options; None means the defaults. seed: the seed of the fixed pattern of positions by
    which those other tokens are chosen. table_V: bool, whether each token id is a boundary; ids beyond the table are
    not. A pass raises ValueError without token ids, or as long as `boundary.ids` is "tokenizer". options: further
    options of `Decision`. With bytes and the defaults, this is the rule of SpaceByte (arXiv 2404.14408).
    """

    is_causal = True
    static = False
    reads_scores = False
    reads_ids = True
    table_V: Tensor

    def __init__(
        self,
        capacity: Capacity | float,
        width: int,
        boundary: Boundaries | None = None,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(capacity, width, **options)
        boundary, self.seed = boundary or Boundaries(), seed
        self.at, self._ids = boundary.at, boundary.resolved()  # no ids: a tokenizer has yet to tell them
        # the last entry, which stands for all larger ids, stays False
        self.register_buffer("table_V", torch.zeros(max(self._ids, default=0) + 2, dtype=torch.bool), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Fill the lookup table `table_V`, bool [V]: whether each token id is a boundary.

        Checkpoints do not contain the table; transformers calls this after loading one.
        """
        self.table_V.zero_()
        self.table_V[self._ids] = True

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.causal(score_BT, x_BTD, tokens)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        id_BT, before_BT = tokens.state.get(IDS), tokens.state.get(IDS_BEFORE)
        if not self._ids:
            raise ValueError(
                "boundary.ids 'tokenizer' is replaced by ids when a training begins; for a model built by hand, give "
                "the ids of boundary_ids(tokenizer), a list of ids, or bytes"
            )
        if id_BT is None or before_BT is None:
            raise ValueError("decision 'boundary' reads input_ids, but this call gives inputs_embeds")
        here_BT, first_BT = self._is_boundary(id_BT), before_BT < 0
        earlier_BT = self._is_boundary(before_BT) & ~first_BT
        if self.at == "every":
            kept_BT = here_BT
        else:
            kept_BT = here_BT & ~earlier_BT if self.at == "first" else earlier_BT & ~here_BT
        if self.capacity.moves:
            spread_BT = hashed(tokens.position_BT, self.seed)
            kept_BT = kept_BT | (spread_BT < (self.capacity.now - self.capacity.final) / (1 - self.capacity.final))
        return (kept_BT | first_BT).expand_as(score_BT)

    def _is_boundary(self, id_BT: Tensor) -> Tensor:
        """Return whether each id is a boundary token, bool [B, T]; ids beyond the table are none."""
        return self.table_V[id_BT.clamp(0, len(self.table_V) - 1)]
