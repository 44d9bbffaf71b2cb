"""Cut token ids into rows of a fixed length.

Every row has input_ids and labels (T,) in Hugging Face's convention: labels are the row's own ids, and the model shifts
them. Tokens that nothing in the row may predict have label -100: the first of the row, the first of each packed
document, padding. So `(labels != -100).sum()` is the number of predictions.

With `document_starts` rows are *packed*: document_ids (T,), 0 for the row's first document and up by one at each start,
and position_ids (T,) that restart at 0 with each document (and with the row, where a document is cut), so that
attention can keep documents apart. Without, they are a *stream*: documents follow each other, separated by eos only.
Shapes: N tokens of a split, D documents, B rows, T tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from skipstone.data import draws
from skipstone.data.ids import Ids, Stitched
from skipstone.data.rows import IGNORE, Batch, RowDataset

WINDOW_STREAM, ORDER_STREAM, AGAIN_STREAM = 0, 1, 1 << 24


@dataclass(frozen=True, kw_only=True, eq=False)
class _Windows(RowDataset):
    """A dataset of rows that are windows of one array of token ids.

    ids: (N,), the ids of a split. context: tokens per row. document_starts: index of each document's first token, for
    rows with document_ids and position_ids; None means rows without these fields.
    """

    ids: Ids | Stitched = field(repr=False)
    context: int
    document_starts: NDArray[np.int64] | None = field(default=None, repr=False)  # (D,) sorted, the first is 0

    def window(self, start_B: NDArray[np.int64]) -> Batch:
        """Return the rows (B, T) by field name whose first tokens have the indices `start_B` in the ids.

        Beyond the end of the ids, the last one is repeated.
        """
        slots_BT = start_B[:, None] + np.arange(self.context)
        input_BT = self.ids[np.minimum(slots_BT, len(self.ids) - 1)].astype(np.int64)
        labels_BT = input_BT.copy()
        labels_BT[:, 0] = IGNORE
        if self.document_starts is None:
            return {"input_ids": input_BT, "labels": labels_BT}
        document_BT = np.searchsorted(self.document_starts, slots_BT, side="right") - 1
        begin_BT = self.document_starts[document_BT]
        labels_BT[slots_BT == begin_BT] = IGNORE
        return {
            "input_ids": input_BT,
            "labels": labels_BT,
            "document_ids": document_BT - document_BT[:, :1],
            "position_ids": slots_BT - np.maximum(begin_BT, start_B[:, None]),
        }


@dataclass(frozen=True, kw_only=True, eq=False)
class RandomWindows(_Windows):
    """A dataset of training rows: windows at uniformly random places of the text, and row i is a function of (seed, i).

    Rows have input_ids and labels, int64 (T,); labels are the ids themselves, or -100 where nothing in the row predicts
    the token. rows: number of rows. ids: int [N], token ids of a split. seed: the seed of the places. context: tokens
    per row, T. document_starts: int64 [D], the index of each document's first token; with it, rows also have
    document_ids and position_ids, int64 (T,), which count from 0 in each row and in each document of a row; None means
    rows without these fields. There are no epochs. Raises ValueError if `ids` is shorter than a row.
    """

    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ids) < self.context:
            raise ValueError(
                f"{len(self.ids)} training tokens are fewer than one context of {self.context}; "
                "choose a smaller context or a larger corpus"
            )

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        places = len(self.ids) - self.context + 1
        return self.window(draws.integers(self.seed, WINDOW_STREAM, index_B, 1, places)[:, 0])


@dataclass(frozen=True, kw_only=True, eq=False)
class WindowsOnce(_Windows):
    """A dataset of training rows that reads no token twice: adjacent windows, in an order shuffled by `seed`.

    Rows have input_ids and labels, int64 (T,); labels are the ids themselves, or -100 where nothing in the row predicts
    the token. rows: number of rows. ids: int [N], token ids of a split. context: tokens per row, T. document_starts:
    int64 [D], the index of each document's first token, for rows with document_ids and position_ids; None means rows
    without these fields. Raises ValueError if `rows` is larger than the number of windows.
    """

    seed: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rows > self.count:
            raise ValueError(
                f"{self.rows:,} training rows of {self.context} tokens, and the text has {self.count:,}: with sampling "
                "'once' none is read twice; train for fewer steps, take a larger corpus, or leave sampling out"
            )

    @property
    def count(self) -> int:
        """The number of adjacent windows of `context` tokens in `ids`.

        Tokens after the last whole window are in no row.
        """
        return len(self.ids) // self.context

    @cached_property
    def _orders(self) -> dict[int, NDArray[np.int64]]:
        return {}

    def _order(self, time: int) -> NDArray[np.int64]:
        """Return the order in which the windows are read in pass `time` over all of them, counted from 0."""
        if time not in self._orders:
            drawn = draws.uniform(self.seed, AGAIN_STREAM + time if time else ORDER_STREAM, np.arange(self.count), 1)
            self._orders[time] = np.argsort(drawn[:, 0], kind="stable")
        return self._orders[time]

    def nth(self, place_B: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the index in `ids` of the first token of each of B windows, int64 [B].

        place_B: int64 [B], the places of the windows in the reading order. 0 is the window read first; after the last
        one, all windows follow again in another order.
        """
        start_B = np.zeros_like(place_B)
        for time in np.unique(place_B // self.count):
            inside_B = place_B // self.count == time
            start_B[inside_B] = self._order(int(time))[place_B[inside_B] % self.count] * self.context
        return start_B

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        return self.window(self.nth(index_B))


def num_covering(tokens: int, context: int) -> int:
    """Return how many overlapping rows predict every one of `tokens` tokens but the first.

    Rows are as in `CoveringWindows`: each has `context` tokens and begins with the last token of the row before.
    """
    return -(-(tokens - 1) // (context - 1))


@dataclass(frozen=True, kw_only=True, eq=False)
class CoveringWindows(_Windows):
    """A dataset of evaluation rows: consecutive windows, each beginning with the last token of the one before.

    Together they predict every token exactly once, except for the first one and, if `document_starts` is given, the
    first one of each document. Rows have input_ids and labels, int64 (T,); labels are -100 where nothing in the row
    predicts the token. The last row may be shorter; `collate` pads it. rows: number of rows; if it is smaller than
    needed, only the beginning of the text is covered. ids: int [N], token ids of a split. context: tokens per row.
    document_starts: int64 [D], the index of each document's first token, for rows with document_ids and position_ids;
    None means rows without these fields. Raises ValueError for fewer than two tokens, or more rows than are needed.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.ids) < 2:
            raise ValueError(
                f"{len(self.ids)} tokens cannot be evaluated: at least 2 are needed; choose a larger corpus"
            )
        if self.rows > num_covering(len(self.ids), self.context):
            raise ValueError(f"rows must be at most {num_covering(len(self.ids), self.context)}, got {self.rows}")

    @property
    def tokens(self) -> int:
        """The number of tokens of the split that these rows cover, including the first one, which is not predicted."""
        return min(len(self.ids), self.rows * (self.context - 1) + 1)

    @property
    def num_labels(self) -> int:
        """The number of tokens that all rows together predict, by which the summed loss is divided to get the mean."""
        if self.document_starts is None:
            return self.tokens - 1
        return self.tokens - int(np.searchsorted(self.document_starts, self.tokens))

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        return self.window(index_B * (self.context - 1))

    def lengths(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.minimum(self.context, len(self.ids) - index_B * (self.context - 1))
