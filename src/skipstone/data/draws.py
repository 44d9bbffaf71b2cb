"""Random numbers as a function of (seed, stream, row, column), so that any row can be generated alone, in any order.

Every 64-bit word is a counter passed through splitmix64's finaliser (Steele, Lea and Flood, OOPSLA 2014, with
Stafford's constants "Mix13"). Resuming needs no generator state. Shapes: R rows, C columns.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Apply splitmix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def uniform(seed: int, stream: int, rows: ArrayLike, columns: int) -> NDArray[np.float64]:
    """Return uniform random numbers in [0, 1), float64 [R, columns], functions of seed, stream, row and column.

    Any row can therefore be drawn alone, in any order. seed, stream: two numbers that select the draws; different
    streams of a seed are independent. rows: int [R], the indices of the rows to draw, or one index (R = 1). columns:
    numbers per row.
    """
    key = np.array([seed], np.uint64)
    for counter in (np.array([stream], np.uint64), np.asarray(rows, np.uint64).reshape(-1, 1), np.arange(columns)):
        key = _mix(key * _GOLDEN + _mix(counter.astype(np.uint64) + _GOLDEN))
    return (key >> np.uint64(11)).astype(np.float64) * 2.0**-53


def integers(seed: int, stream: int, rows: ArrayLike, columns: int, below: int) -> NDArray[np.int64]:
    """Return uniform random integers in [0, below), int64 [R, columns], functions of seed, stream, row and column.

    seed, stream: two numbers that select the draws; different streams of a seed are independent. rows: int [R], the
    indices of the rows to draw, or one index (R = 1). columns: numbers per row. below: the upper bound, exclusive, at
    most about 2^53.
    """
    return (uniform(seed, stream, rows, columns) * below).astype(np.int64)
