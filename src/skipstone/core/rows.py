"""Some rows of a batch, known to host and device: what decoding gathers where rows disagree.

Shape letters: B rows, R rows of these.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Rows:
    """at: their indices in ascending order, on the host, where the cache keeps its lengths. index_R: the same on the
    device, int64. total: B.
    """

    at: tuple[int, ...]
    index_R: Tensor
    total: int

    @classmethod
    def kept(cls, kept_B: Tensor) -> Rows:
        """Those that a bool mask names. The host waits once; what it then reads is ready."""
        index_R = kept_B.nonzero()[:, 0]
        return cls(at=tuple(index_R.tolist()), index_R=index_R, total=kept_B.shape[0])

    def within(self, outer: Rows | None) -> Rows:
        """These rows, whose numbers count among `outer`, as rows of the batch that `outer` was taken from."""
        if outer is None:
            return self
        at = tuple(outer.at[i] for i in self.at)
        return Rows(at=at, index_R=outer.index_R.index_select(0, self.index_R), total=outer.total)

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
