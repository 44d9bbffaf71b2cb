"""`Stitched`: several arrays of token ids, in memory or on disk, as one long array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.unsignedinteger[Any]]


class Stitched:
    """Several arrays of token ids presented as one long array; only the parts that are indexed are read.

    parts: the arrays, of one dtype. starts, ends: int64 [parts], for each part the index of its first id in the long
    array and the index after its last. `len(x)` is the number of ids. `x[slice]` and `x[integer array]` return copies;
    negative integers are not supported.
    """

    def __init__(self, parts: Sequence[Ids]) -> None:
        self.parts = parts
        self.ends: NDArray[np.int64] = np.cumsum([len(part) for part in parts], dtype=np.int64)
        self.starts = self.ends - np.array([len(part) for part in parts], np.int64)

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, at: slice | NDArray[np.int64]) -> Ids:
        slots = np.arange(*at.indices(len(self))) if isinstance(at, slice) else at
        part_of = np.searchsorted(self.ends, slots, side="right")
        found = np.empty(slots.shape, self.parts[0].dtype)
        for part in np.unique(part_of):
            inside = part_of == part
            found[inside] = self.parts[part][slots[inside] - self.starts[part]]
        return found
