"""Rows from several sources, in shares that may change during training.

Nothing depends on a generator's state: the source of row i, and its place in this source, follow from i and the
dataset's fields alone. Shapes: N rows in all, S sources, B rows of a batch, T tokens per row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from skipstone.core.strict import unknown
from skipstone.data import draws
from skipstone.data.config import Blend
from skipstone.data.packing import CoveringWindows, WindowsOnce
from skipstone.data.rows import Batch, RowDataset

SOURCE_STREAM = 1 << 20  # far from the streams from which windows are drawn


def check_sources(blend: Blend, known: Sequence[str]) -> None:
    """Raise ValueError if the blend names a source that is not in `known`.

    The message names the nearest known source. A source is a folder of tokenised text. blend: the shares of training
    rows by source, to be checked. known: the names of the sources that exist.
    """
    for name in {**blend.start, **(blend.end or {})}:
        if name not in known:
            raise ValueError(unknown("source in blend", name, known))


@dataclass(frozen=True, kw_only=True, eq=False)
class _Joined(RowDataset):
    """A dataset of rows that are taken from several parts, such as the sources of a blend."""

    @property
    def plan(self) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """For each of N rows, the index of its part and its place within the part, two arrays [N]."""
        raise NotImplementedError

    def pick(self, part: int, place_B: NDArray[np.int64]) -> Batch:
        """Return B rows of one part, as int64 arrays [B, T] by field name.

        part: index of the part. place_B: the rows' places within it.
        """
        raise NotImplementedError

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        part_B, place_B = (of_row[index_B] for of_row in self.plan)
        found: Batch = {}
        for part in np.unique(part_B):
            inside_B = part_B == part
            for name, x_BT in self.pick(int(part), place_B[inside_B]).items():
                found.setdefault(name, np.zeros((len(index_B), x_BT.shape[1]), np.int64))[inside_B] = x_BT
        return found


@dataclass(frozen=True, kw_only=True, eq=False)
class BlendedWindows(_Joined):
    """A dataset of training rows from several sources, mixed in shares that may change over the training.

    Each source is divided into adjacent windows. Every window is read once, in an order shuffled by the seed; when all
    have been read, they are read again in another order. rows: number of rows in all; row i depends on this number,
    because the shares depend on the progress i / rows. sources: the windows of each source. names: the names of the
    sources, in the order of `sources`. blend: the share of the rows that each source has. seed: the seed by which the
    source of each row is drawn. once: whether to raise ValueError if `rows` rows would read some window twice; if
    False, they may. A row is a dict of int64 tensors (T,): input_ids and labels, and for packed sources document_ids
    and position_ids.
    """

    sources: tuple[WindowsOnce, ...] = field(repr=False)
    names: tuple[str, ...]
    blend: Blend
    seed: int
    once: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, source in zip(self.names, self.sources, strict=True) if self.once else ():
            asked = int((self.plan[0] == self.names.index(name)).sum())
            if asked > source.count:
                raise ValueError(
                    f"{asked:,} training rows of {source.context} tokens from source {name!r}, which has "
                    f"{source.count:,}: with sampling 'once' none is read twice; train for fewer steps, take less of "
                    "it, or leave sampling out"
                )

    @cached_property
    def plan(self) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """The index of each of N rows' source, and the row's place within that source: two int arrays [N].

        The index counts in `sources`, the place counts the rows of the source in reading order; both begin with 0.
        """
        index_N = np.arange(self.rows)
        ends_NS = np.cumsum(self.blend.shares(index_N / self.rows), axis=1)
        drawn_N1 = draws.uniform(self.seed, SOURCE_STREAM, index_N, 1)
        source_N = np.minimum((drawn_N1 >= ends_NS).sum(1), len(self.sources) - 1).astype(np.int16)
        place_N = np.zeros(self.rows, np.int64)
        for source in range(len(self.sources)):
            inside_N = source_N == source
            place_N[inside_N] = np.arange(inside_N.sum())
        return source_N, place_N

    def pick(self, part: int, place_B: NDArray[np.int64]) -> Batch:
        source = self.sources[part]
        return source.window(source.nth(place_B))


@dataclass(frozen=True, kw_only=True, eq=False)
class InTurn(_Joined):
    """A dataset of evaluation rows from several parts: the first row of each part, then the second of each, and so on.

    The first rows of the dataset therefore come from all parts. A part that has no more rows is passed over. parts: the
    rows of each part. rows: number of rows of the dataset, at most the number in all parts.
    """

    parts: tuple[CoveringWindows, ...] = field(repr=False)

    @cached_property
    def plan(self) -> tuple[NDArray[np.integer], NDArray[np.int64]]:
        """For each of N rows, the index of its part in `parts` and the row's index in that part: two int arrays [N]."""
        part_N = np.concatenate([np.full(len(part), i) for i, part in enumerate(self.parts)])
        place_N = np.concatenate([np.arange(len(part)) for part in self.parts])
        order_N = np.lexsort((part_N, place_N))[: self.rows]
        return part_N[order_N], place_N[order_N]

    def pick(self, part: int, place_B: NDArray[np.int64]) -> Batch:
        return self.parts[part].batch(place_B)

    def lengths(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        part_B, place_B = (of_row[index_B] for of_row in self.plan)
        found_B = np.zeros(len(index_B), np.int64)
        for i, part in enumerate(self.parts):
            found_B[part_B == i] = part.lengths(place_B[part_B == i])
        return found_B

    def reached(self) -> list[CoveringWindows]:
        """Return the parts, each shortened to those of its rows that are in this dataset.

        Parts without a row in this dataset are left out. Callers count the predictions and bytes of those returned.
        """
        counts = np.bincount(self.plan[0], minlength=len(self.parts))
        return [replace(part, rows=int(n)) for part, n in zip(self.parts, counts, strict=True) if n]
