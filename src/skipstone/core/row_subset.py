"""`RowSubset`: some rows of a batch, as indices on both CPU and device.

A decoding step computes only the rows whose token is kept.

Shape letters: B rows of the batch, R rows of the subset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN_SHARE = 0.5  # assumed share of kept tokens where a mechanism guarantees none
LEAST_IDLE = 0.1  # smallest share of steps without any kept row for which checking saves more than it costs


def rows_pay(total: int, share: float | None, device: torch.device) -> bool:
    """Return whether a decoding step saves time if it finds out which rows keep their token and computes only these.

    On a CPU it always does: the check is free and every skipped row saves time. On a GPU the check makes the CPU wait,
    and a block takes as long for one row as for many (it reads its weights); only steps in which no row keeps its token
    save time, and these must make up at least a tenth. total: number of rows. share: long-run share of kept tokens,
    from 0 to 1; None means that 0.5 is assumed. device: where the model runs.
    """
    if device.type == "cpu":
        return True
    kept = UNKNOWN_SHARE if share is None else share
    return (1 - kept) ** total >= LEAST_IDLE


@dataclass(frozen=True, kw_only=True)
class RowSubset:
    """Some rows of a batch, with their indices on the CPU as well as on the model's device.

    at: indices in ascending order, as ints. index_R: the same as an int64 tensor on the device. total: number of rows
    of the batch.
    """

    at: tuple[int, ...]
    index_R: Tensor
    total: int

    @classmethod
    def from_mask(cls, kept_B: Tensor) -> RowSubset:
        """Return the rows where the bool mask kept_B [B] is True. On a GPU, the CPU waits for the mask once."""
        index_R = kept_B.nonzero()[:, 0]
        return cls(at=tuple(index_R.tolist()), index_R=index_R, total=kept_B.shape[0])

    def within(self, outer: RowSubset | None) -> RowSubset:
        """Return the same rows with their indices in a larger batch.

        outer: which rows of the larger batch make up the batch to which these indices refer; None if the two batches
        are the same.
        """
        if outer is None:
            return self
        at = tuple(outer.at[i] for i in self.at)
        return RowSubset(at=at, index_R=outer.index_R.index_select(0, self.index_R), total=outer.total)

    def gather(self, x: Tensor) -> Tensor:
        """Return the subset's rows of x [B, ...], as [R, ...].

        If the first axis of x has size 1 (all rows equal), x is returned unchanged.
        """
        if x.shape[0] == 1:
            return x
        if len(self.at) == 1:
            return x[self.at[0] : self.at[0] + 1]
        return x.index_select(0, self.index_R)

    def scatter(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """Return [B, ...] with y at the rows of the subset and `fill` at all others.

        y: [R, ...], or [1, ...] for R equal rows.
        """
        base = y.new_full((self.total, *y.shape[1:]), fill)
        return base.index_copy_(0, self.index_R, y.expand(len(self.at), *y.shape[1:]))
