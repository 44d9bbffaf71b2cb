"""The copy and sort tasks: n symbols, a separator, the same symbols again (in order, or sorted), an end token.

The context is 2n + 2. The 32 ids are as in arXiv 2605.05222, their order is ours: symbols 0..29, separator 30, end 31.
Labels follow Hugging Face's convention (the model shifts) and are -100 up to the separator. Shapes: B rows, N symbols,
T = 2N + 2 tokens per row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from skipstone.data import draws
from skipstone.data.rows import IGNORE, Batch, RowDataset

VOCAB_SIZE = 32
SEPARATOR, END = 30, 31


@dataclass(frozen=True, kw_only=True, eq=False)
class Sequences(RowDataset):
    """A dataset for the copy or sort task: n symbols, a separator, the symbols again (sorted or not), an end token.

    rows: number of rows. task: "copy" or "sort". context: tokens per row, 2n + 2. seed, stream: row i is a function of
    (seed, stream, i), where streams separate training from validation rows. Rows have input_ids and labels, int64 (T,);
    labels are not shifted, and -100 up to and including the separator. Raises ValueError unless `context` is even and
    at least 4.
    """

    task: Literal["copy", "sort"]
    context: int
    seed: int
    stream: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.context < 4 or self.context % 2:
            raise ValueError(f"context of the {self.task} task must be 2n + 2, even and at least 4, got {self.context}")

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        n = (self.context - 2) // 2
        symbols_BN = draws.integers(self.seed, self.stream, index_B, n, SEPARATOR)
        answer_BN = np.sort(symbols_BN, axis=1) if self.task == "sort" else symbols_BN
        separator_B1, end_B1 = np.full((len(index_B), 1), SEPARATOR), np.full((len(index_B), 1), END)
        input_BT = np.concatenate([symbols_BN, separator_B1, answer_BN, end_B1], axis=1)
        labels_BT = input_BT.copy()
        labels_BT[:, : n + 1] = IGNORE
        return {"input_ids": input_BT, "labels": labels_BT}
