"""Unpadding: leave out the padding between rows that keep different numbers of tokens.

Per-token layers (projections, MLP) run on the real tokens of all rows concatenated. Shape letters: B rows, T tokens
given, K columns of the fullest row, N real tokens of all rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.ops import reference as ops

LARGEST_SHARE = 0.9  # of real tokens among the B K columns; above it, copying costs what is saved


def pays(count: int, columns: int) -> bool:
    """Return whether `count` real tokens in `columns` columns are few enough for unpadding to save time."""
    return 0 < count <= LARGEST_SHARE * columns


@dataclass(frozen=True, kw_only=True)
class Unpadding:
    """Indices of the real tokens.

    place_N: int64, their indices among the B K columns. source_N: their indices among the B T tokens that the columns
    were gathered from.
    """

    place_N: Tensor
    source_N: Tensor
    shape: tuple[int, int]  # B, K

    def unpad(self, x_BKD: Tensor) -> Tensor:
        """Return the real tokens [1, N, ...] of x [B, K, ...]."""
        return _picked(x_BKD.expand(self.shape[0], *x_BKD.shape[1:]), self.place_N)

    def pad(self, y_1ND: Tensor) -> Tensor:
        """Invert `unpad`: return [B, K, ...] with 0 for padding."""
        return _scattered(y_1ND, self.place_N, self.shape)

    def gather(self, x_BTD: Tensor) -> Tensor:
        """Return the real tokens [1, N, ...] of x [B, T, ...]."""
        return _picked(x_BTD, self.source_N)

    def scatter(self, y_1ND: Tensor, length: int) -> Tensor:
        """Invert `gather`: return [B, T, ...] with 0 at all other tokens."""
        return _scattered(y_1ND, self.source_N, (self.shape[0], length))


def unpadding_of(index_BK: Tensor, valid_BK: Tensor, count: int, length: int) -> Unpadding | None:
    """Return the unpadding of `count` valid columns; None if there is little padding, and in compiled passes.

    Compiled passes are excluded because N, and with it the shapes, would change from call to call.
    """
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
