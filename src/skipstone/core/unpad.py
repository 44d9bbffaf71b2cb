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
    """Return whether leaving out padding saves time, which is so if at most 90 % of the columns are real tokens.

    count: number of real tokens; for 0 the result is False. columns: number of all columns, B K.
    """
    return 0 < count <= LARGEST_SHARE * columns


@dataclass(frozen=True, kw_only=True)
class Unpadding:
    """The indices of the N real tokens of a batch, to concatenate them without padding as [1, N, ...].

    The padded batch has K columns per row, gathered from T tokens per row. place_N: int64, indices of the real tokens
    among the B K columns. source_N: int64, their indices among the B T tokens. shape: (B, K).
    """

    place_N: Tensor
    source_N: Tensor
    shape: tuple[int, int]  # B, K

    def unpad(self, x_BKD: Tensor) -> Tensor:
        """Return the N real tokens of a padded batch, concatenated: [1, N, ...].

        x_BKD: padded rows [B, K, ...], or [1, K, ...] if all B rows are equal.
        """
        return _picked(x_BKD.expand(self.shape[0], *x_BKD.shape[1:]), self.place_N)

    def pad(self, y_1ND: Tensor) -> Tensor:
        """Return padded rows [B, K, ...] of N concatenated tokens, with 0 for padding; inverse of `unpad`.

        y_1ND: the tokens, [1, N, ...].
        """
        return _scattered(y_1ND, self.place_N, self.shape)

    def gather(self, x_BTD: Tensor) -> Tensor:
        """Return the N real tokens, [1, N, ...], from x_BTD [B, T, ...], which has all T tokens of each row."""
        return _picked(x_BTD, self.source_N)

    def scatter(self, y_1ND: Tensor, length: int) -> Tensor:
        """Return [B, T, ...] with the N tokens y_1ND at their places among all T tokens, else 0; inverse of `gather`.

        length: T.
        """
        return _scattered(y_1ND, self.source_N, (self.shape[0], length))


def unpadding_of(index_BK: Tensor, valid_BK: Tensor, count: int, length: int) -> Unpadding | None:
    """Return the indices that leave out the padding of gathered rows; None if under 10 % of the columns are padding.

    So little padding is not worth the copies. index_BK: int64, index of each column among the T tokens of its row.
    valid_BK: bool, False for padding. count: number of valid columns; for 0 the result is None. length: T. Under
    torch.compile the result is None, because `count` would change the shapes from call to call.
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
