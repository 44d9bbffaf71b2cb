"""`RowDataset`, the base class of map-style datasets, and the collator.

Shapes: B rows, T tokens per row.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

IGNORE = -100  # Hugging Face's label for tokens without a target
Row = dict[str, Tensor]
Batch = dict[str, NDArray[np.int64]]
_PADDING = {"labels": IGNORE, "shift_labels": IGNORE, "document_ids": -1, "difficulty": -1}


@dataclass(frozen=True, kw_only=True, eq=False)
class RowDataset(Dataset[Row]):
    """A map-style dataset of `rows` rows, whose row i depends on the fields of the dataset and on i alone.

    A row of T tokens is a dict of int64 tensors [T]: `input_ids` and `labels`, and in some datasets `shift_labels`,
    `document_ids`, `position_ids` or `difficulty` (the depth that a token needs). A trainer that reads rows 0, 1, 2,
    ... in order can resume at the row where it stopped. `dataclasses.replace(dataset, rows=n)` changes only how many
    rows there are, except in `BlendedWindows`, whose shares depend on `rows`. Subclasses implement `batch`, which
    builds several rows at once. Raises ValueError for `rows` below 1, and IndexError for an index that is negative or
    at least `rows`.
    """

    rows: int

    def __post_init__(self) -> None:
        if self.rows < 1:
            raise ValueError(f"rows must be at least 1, got {self.rows}")

    @abstractmethod
    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        """Return the rows with the indices `index_B` as int64 arrays (B, T) by field name, T being that of the longest.

        index_B: int64 (B,), from 0 to rows - 1, which callers have checked. Shorter rows end where `lengths` says; the
        values after their ends are not used.
        """

    def lengths(self, index_B: NDArray[np.int64]) -> NDArray[np.int64] | None:
        """Return the numbers of tokens of the rows with the indices `index_B`, int64 (B,).

        None means that all rows have the same number of tokens.
        """
        return None

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, index: int) -> Row:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Row]:
        index_B = np.asarray(indices, np.int64).reshape(-1)
        if len(index_B) and (index_B.min() < 0 or index_B.max() >= self.rows):
            raise IndexError(f"row index out of range: {indices!r} of {self.rows} rows")
        fields = {name: torch.from_numpy(np.ascontiguousarray(x_BT)) for name, x_BT in self.batch(index_B).items()}
        lengths = self.lengths(index_B)
        return [
            {name: x_BT[b] if lengths is None else x_BT[b, : int(lengths[b])] for name, x_BT in fields.items()}
            for b in range(len(index_B))
        ]


def collate(items: Sequence[Row], pad_id: int = 0) -> Row:
    """Stack rows into a batch of int64 tensors (B, T), where T is the length of the longest row.

    items: rows as dicts of tensors (T,). Shorter rows are padded on the right: with `pad_id` in input_ids, -100 in
    labels and shift_labels, -1 in document_ids and difficulty, 0 in other fields. Only if there is padding does the
    batch have an `attention_mask` (B, T), 1 for real tokens, because models are faster without one.
    """
    lengths = torch.tensor([len(item["input_ids"]) for item in items])
    padding = _PADDING | {"input_ids": pad_id}
    batch = {
        name: torch.nn.utils.rnn.pad_sequence([item[name] for item in items], True, padding.get(name, 0))
        for name in items[0]
    }
    if int(lengths.min()) != int(lengths.max()):
        batch["attention_mask"] = (torch.arange(int(lengths.max())) < lengths[:, None]).long()
    return batch
