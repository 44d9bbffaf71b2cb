"""Tokens without the padding between them: rows that keep different numbers are gathered to the width of the fullest.

What looks at one token at a time (projections, MLP) runs on the real ones of all rows behind each other.
Shape letters: B rows, T tokens given, K columns of the fullest row, N real tokens of all rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.ops import reference as ops

LARGEST_SHARE = 0.9  # of real tokens among B K: above it, copying costs what is saved


def pays(count: int, columns: int) -> bool:
    """Whether so many real tokens in so many columns are worth unpadding."""
    return 0 < count <= LARGEST_SHARE * columns


@dataclass(frozen=True, kw_only=True)
class Unpadding:
    """place_N: int64, where the real tokens stand in the B K columns; source_N: in the B T tokens they come from."""

    place_N: Tensor
    source_N: Tensor
    shape: tuple[int, int]  # B, K

    def unpad(self, x_BKD: Tensor) -> Tensor:
        """[1, N, ...]."""
        return _picked(x_BKD.expand(self.shape[0], *x_BKD.shape[1:]), self.place_N)

    def pad(self, y_1ND: Tensor) -> Tensor:
        """[B, K, ...], 0 in between."""
        return _scattered(y_1ND, self.place_N, self.shape)

    def gather(self, x_BTD: Tensor) -> Tensor:
        """[1, N, ...] of the tokens from which the columns were gathered."""
        return _picked(x_BTD, self.source_N)

    def scatter(self, y_1ND: Tensor, length: int) -> Tensor:
        """[B, T, ...], 0 at all other tokens."""
        return _scattered(y_1ND, self.source_N, (self.shape[0], length))


def unpadding_of(index_BK: Tensor, valid_BK: Tensor, count: int, length: int) -> Unpadding | None:
    """Of `count` valid columns; None where there is next to nothing between them, and in compiled passes, whose shapes
    should not follow from every decision."""
    B, K = index_BK.shape
    if not pays(count, B * K) or torch.compiler.is_compiling():
        return None
    place_N = ops.compact(valid_BK.view(1, -1), count)[0]
    offset_B1 = torch.arange(B, device=index_BK.device)[:, None] * length
    return Unpadding(place_N=place_N, source_N=(index_BK + offset_B1).flatten().index_select(0, place_N), shape=(B, K))


def _picked(x_BTD: Tensor, at_N: Tensor) -> Tensor:
    return x_BTD.reshape(-1, *x_BTD.shape[2:]).index_select(0, at_N)[None]


def _scattered(y_1ND: Tensor, at_N: Tensor, shape: tuple[int, int]) -> Tensor:
    rest = y_1ND.shape[2:]
    flat = y_1ND.new_zeros(shape[0] * shape[1], *rest).index_copy_(0, at_N, y_1ND[0])
    return flat.view(*shape, *rest)
