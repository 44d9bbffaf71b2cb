"""`RowSubset`: some rows of a batch, known to host and device. Decoding computes these where rows decide differently.

Shape letters: B rows of the batch, R rows of the subset.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN_SHARE = 0.5  # assumed share of kept tokens where a mechanism guarantees none
LEAST_IDLE = 0.1  # smallest share of steps without any kept row for which checking saves more than it costs


def rows_pay(total: int, share: float | None, device: torch.device) -> bool:
    """Return whether a decoding step should find out which of `total` rows keep their token, and compute only these.

    On a CPU it always should: the check is free, and every skipped row saves time. On an accelerator the host would
    have to wait for the decision, and a block takes as long as reading its weights, for one row as for many; only steps
    in which no row needs the block save time. share: the long-run share of kept tokens, from which the frequency of
    such steps follows; None if unknown.
    """
    if device.type == "cpu":
        return True
    kept = UNKNOWN_SHARE if share is None else share
    return (1 - kept) ** total >= LEAST_IDLE


@dataclass(frozen=True, kw_only=True)
class RowSubset:
    """A subset of the rows of a batch, with its indices on host and device.

    at: the rows' indices in ascending order, on the host, where the cache keeps its lengths. index_R: the same indices
    on the device, int64. total: B.
    """

    at: tuple[int, ...]
    index_R: Tensor
    total: int

    @classmethod
    def from_mask(cls, kept_B: Tensor) -> RowSubset:
        """Return the rows where a bool mask is True. The host waits once."""
        index_R = kept_B.nonzero()[:, 0]
        return cls(at=tuple(index_R.tolist()), index_R=index_R, total=kept_B.shape[0])

    def within(self, outer: RowSubset | None) -> RowSubset:
        """Return these rows as rows of the larger batch from which `outer` was taken."""
        if outer is None:
            return self
        at = tuple(outer.at[i] for i in self.at)
        return RowSubset(at=at, index_R=outer.index_R.index_select(0, self.index_R), total=outer.total)

    def gather(self, x: Tensor) -> Tensor:
        """Return [R, ...] of x [B, ...]; an axis of size 1 stands for equal rows and is returned as it is."""
        if x.shape[0] == 1:
            return x
        if len(self.at) == 1:
            return x[self.at[0] : self.at[0] + 1]
        return x.index_select(0, self.index_R)

    def scatter(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """Return [B, ...] with y ([R, ...] or [1, ...]) at these rows and `fill` at all others."""
        base = y.new_full((self.total, *y.shape[1:]), fill)
        return base.index_copy_(0, self.index_R, y.expand(len(self.at), *y.shape[1:]))
