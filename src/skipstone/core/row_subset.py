"""Some rows of a batch, known to host and device: what decoding gathers where rows disagree.

Shape letters: B rows, R rows of these.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

UNKNOWN_SHARE = 0.5  # of tokens that a block keeps, where nothing is promised
LEAST_IDLE = 0.1  # share of steps in which nobody needs a block, below which asking costs more than it saves


def rows_pay(total: int, share: float | None, device: torch.device) -> bool:
    """Whether a decoding step should find out which of `total` rows keep their token, and compute these alone.

    On a CPU always: looking costs nothing, and every row that is left out is time saved. On an accelerator the host
    would have to wait for the decision, and the time of a block is that of reading its weights, whoever asks: only
    steps without anyone save it. How many these are follows from figures that are known beforehand.
    """
    if device.type == "cpu":
        return True
    kept = UNKNOWN_SHARE if share is None else share
    return (1 - kept) ** total >= LEAST_IDLE


@dataclass(frozen=True, kw_only=True)
class RowSubset:
    """at: their indices in ascending order, on the host, where the cache keeps its lengths. index_R: the same on the
    device, int64. total: B.
    """

    at: tuple[int, ...]
    index_R: Tensor
    total: int

    @classmethod
    def from_mask(cls, kept_B: Tensor) -> RowSubset:
        """Those that a bool mask names. The host waits once; what it then reads is ready."""
        index_R = kept_B.nonzero()[:, 0]
        return cls(at=tuple(index_R.tolist()), index_R=index_R, total=kept_B.shape[0])

    def within(self, outer: RowSubset | None) -> RowSubset:
        """These rows, whose numbers count among `outer`, as rows of the batch that `outer` was taken from."""
        if outer is None:
            return self
        at = tuple(outer.at[i] for i in self.at)
        return RowSubset(at=at, index_R=outer.index_R.index_select(0, self.index_R), total=outer.total)

    def gather(self, x: Tensor) -> Tensor:
        """[R, ...] of x [B, ...]; an axis of size 1 means that all rows agree, and stays."""
        if x.shape[0] == 1:
            return x
        if len(self.at) == 1:
            return x[self.at[0] : self.at[0] + 1]
        return x.index_select(0, self.index_R)

    def scatter(self, y: Tensor, fill: float = 0.0) -> Tensor:
        """[B, ...] with y [R or 1, ...] at these rows and `fill` at all others."""
        base = y.new_full((self.total, *y.shape[1:]), fill)
        return base.index_copy_(0, self.index_R, y.expand(len(self.at), *y.shape[1:]))
