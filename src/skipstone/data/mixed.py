"""The mixed corpus: text in which half of the windows contain a span of 32 entries of Switched-S3.

The depth that text needs is unknown, while the depth that a span's operations need is known. The corpus thus shows
whether a model spends depth where it is needed, and what that costs on text.

Switched-S3 (`switched.py`) is a synthetic task of operations on a permutation, of fillers that do nothing, and of
switches. A span begins at a uniformly random place, at least one token from either end of its window, and is
independent of other spans. Its symbols are 15 additional tokens after the text's vocabulary. Targets are aligned with
the inputs (`shift_labels`): in text the next token, at an entry of a span the state after an operation, else the entry
itself. There is no target at the token before a span, whose first entry is random, and at the window's last token.
`difficulty` is -2 in text, and in spans the number of operations since the last reset, or -1 for fillers and switches.
Shapes: B rows, T tokens per row, S entries of a span.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from skipstone.data import draws
from skipstone.data.packing import CoveringWindows, RandomWindows, WindowsOnce
from skipstone.data.rows import IGNORE, Batch, RowDataset
from skipstone.data.switched import NAMES, SwitchedS3
from skipstone.data.synthetic import aligned

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPAN = 32
SHARE = 0.5  # share of windows with a span
TEXT = -2  # difficulty of text: unknown
PLACE_STREAMS, SPAN_STREAM = 64, 32  # far from the streams from which windows are drawn


@dataclass(frozen=True, kw_only=True, eq=False)
class MixedWindows(RowDataset):
    """A dataset of text windows, half of which contain a span of 32 tokens from the synthetic task Switched-S3.

    Rows have int64 (T,): input_ids; shift_labels, the target of the logits at the same place; labels, the same targets
    one place later; and difficulty, the depth that a token of a span needs (the number of operations since the last
    reset, -1 for fillers and switches, -2 for all tokens of the text, whose depth is not known). rows: number of rows.
    text: the windows of text, T tokens each. first_id: id of the first of the span's 15 symbols, whose ids follow the
    text's vocabulary. seed, stream: row i is a function of row i of the text and of (seed, stream, i); streams separate
    training from validation. Raises ValueError for a context of fewer than 34 tokens.
    """

    text: RandomWindows | WindowsOnce | CoveringWindows = field(repr=False)
    first_id: int
    seed: int
    stream: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text.context < SPAN + 2:
            raise ValueError(
                f"context must be at least {SPAN + 2}, a span and a token around it, got {self.text.context}"
            )
        object.__setattr__(self, "text", replace(self.text, rows=self.rows))

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        input_BT, target_BT = self._text(index_B)
        difficulty_BT = np.full_like(input_BT, TEXT)
        row_R1 = np.flatnonzero(self.spanned(index_B))[:, None]
        index_R = index_B[row_R1[:, 0]]
        span = SwitchedS3(rows=1, seed=self.seed, stream=SPAN_STREAM + self.stream, context=SPAN).batch(index_R)
        start_R1 = 1 + draws.integers(self.seed, self._place + 1, index_R, 1, self.text.context - SPAN - 1)
        slot_RS = start_R1 + np.arange(SPAN)
        input_BT[row_R1, slot_RS] = self.first_id + span["input_ids"]
        target_BT[row_R1, slot_RS] = self.first_id + span["shift_labels"]
        target_BT[row_R1, start_R1 - 1] = IGNORE
        difficulty_BT[row_R1, slot_RS] = span["difficulty"]
        return aligned(input_BT, target_BT, difficulty_BT)

    def lengths(self, index_B: NDArray[np.int64]) -> NDArray[np.int64] | None:
        return self.text.lengths(index_B)

    def spanned(self, index_B: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return which of B rows contain a span of the synthetic task Switched-S3, bool [B].

        index_B: int64 [B], the indices of the rows. A row of evaluation text that is shorter than the context has none.
        """
        drawn_B = draws.uniform(self.seed, self._place, index_B, 1)[:, 0] < SHARE
        lengths_B = self.lengths(index_B)
        return drawn_B if lengths_B is None else drawn_B & (lengths_B == self.text.context)

    @property
    def num_labels(self) -> int:
        """The number of tokens that all rows together predict: those of the text, minus one for each span.

        The token before a span has no target, because the first token of a span is random. Only for windows of
        evaluation text (`CoveringWindows`).
        """
        assert isinstance(self.text, CoveringWindows)
        return self.text.num_labels - int(self.spanned(np.arange(self.rows)).sum())

    @property
    def _place(self) -> int:
        return PLACE_STREAMS + 2 * self.stream

    def _text(self, index_B: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return token ids and the tokens that follow them, int64 [B, T] each, of the text's rows `index_B`.

        The last real token of a row has no target (-100).
        """
        text = self.text.batch(index_B)
        target_BT = np.full_like(text["labels"], IGNORE)
        target_BT[:, :-1] = text["labels"][:, 1:]
        lengths_B = self.lengths(index_B)
        if lengths_B is not None:
            target_BT[np.arange(len(index_B)), lengths_B - 1] = IGNORE
        return text["input_ids"], target_BT


def with_spans(tokenizer: PreTrainedTokenizerBase) -> int:
    """Add the 15 symbols of Switched-S3 to the tokenizer as tokens, unless it has them; return the id of the first.

    The tokenizer is changed in place, and the ids of the symbols are consecutive. Raises ValueError if the tokenizer
    already has one of these tokens at another place.
    """
    names = [f"<{name}>" for name in NAMES]
    tokenizer.add_special_tokens({"extra_special_tokens": names}, replace_extra_special_tokens=False)
    ids = tokenizer.convert_tokens_to_ids(names)
    assert isinstance(ids, list)
    if ids != [*range(ids[0], ids[0] + len(names))]:
        raise ValueError(f"the tokenizer has a token of its own among {', '.join(names)}, which the spans need")
    return ids[0]
