"""Selections: the tokens of a call that a decision keeps, with the gather and scatter operations that it implies.

There is one class for each layout: all tokens; tokens marked in place; tokens gathered (rows filled exactly, padded, or
padded with the padding left out of per-token layers); whole rows, with one of these inside.

Shape letters: B rows, T tokens of the call, K tokens of a selection, N kept tokens of all rows, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from skipstone.core.row_subset import RowSubset
from skipstone.core.unpad import Unpadding
from skipstone.ops import reference as ops


class Selection:
    """The kept tokens of each row, in order of slot. Subclasses define their layout.

    is_all: whether every token is kept, known without a host sync. real_first: whether the kept tokens come first in
    every row, so that attention over them needs no mask. valid_BK: bool, which of the K columns are kept tokens; None:
    all. unpadding: indices of the kept tokens, if many of the columns are padding.
    """

    is_all = False
    real_first = False
    valid_BK: Tensor | None = None
    unpadding: Unpadding | None = None

    @property
    def width(self) -> int:
        """The number of columns K, the largest number of tokens that a row keeps."""
        raise NotImplementedError

    @property
    def is_empty(self) -> bool:
        """Whether no token is kept, known without a host sync."""
        return self.width == 0

    def gather(self, x_BTD: Tensor) -> Tensor:
        """Return the kept tokens [B, K, ...] of x [B, T, ...]."""
        raise NotImplementedError

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        """Return [B, T, ...] with y at the kept tokens and `fill` at all others."""
        raise NotImplementedError

    def mask(self) -> Tensor:
        """Return the kept tokens as a bool mask [B, T]."""
        raise NotImplementedError

    def gather_unpadded(self, x_BTD: Tensor) -> Tensor:
        """Return [1, N, ...] of the kept tokens alone if there is an `unpadding`, else as `gather`."""
        return self.gather(x_BTD)

    def scatter_unpadded(self, y: Tensor) -> Tensor:
        """Return [B, T, ...] with the unpadded y at the kept tokens and 0 at all others."""
        return self.scatter(y)

    def and_mask(self, kept_BT: Tensor) -> Tensor:
        """Return the bool mask [B, T] of tokens that are kept both here and in `kept_BT`."""
        return kept_BT & self.mask()

    def merge(self, new_BKD: Tensor, old_BTD: Tensor) -> Tensor:
        """Return `old_BTD` with `new_BKD` at the kept tokens."""
        return torch.where(self.mask(), self.scatter(new_BKD), old_BTD)

    def rows_of(self, outer: RowSubset | None) -> RowSubset | None:
        """Return the cache rows of the kept tokens, given those of the call's tokens (`outer`)."""
        return outer


class Everyone(Selection):
    """The selection of all tokens of the call."""

    is_all = True
    is_empty = False

    def gather(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        return y_BKD

    def and_mask(self, kept_BT: Tensor) -> Tensor:
        return kept_BT

    def merge(self, new_BKD: Tensor, old_BTD: Tensor) -> Tensor:
        return new_BKD


EVERYONE = Everyone()


@dataclass(frozen=True)
class InPlace(Selection):
    """A selection that leaves all tokens in place, K = T; those that are not valid are not kept."""

    valid_BK: Tensor = field()

    @property
    def width(self) -> int:
        return self.valid_BK.shape[1]

    def gather(self, x_BTD: Tensor) -> Tensor:
        return x_BTD

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        return _where(self.valid_BK, y_BKD, fill)

    def mask(self) -> Tensor:
        return self.valid_BK


@dataclass(frozen=True)
class Gathered(Selection):
    """The K tokens of each row at `index_BK`, out of `length` = T; all of them are kept."""

    real_first = True
    index_BK: Tensor
    length: int

    @property
    def width(self) -> int:
        return self.index_BK.shape[1]

    def gather(self, x_BTD: Tensor) -> Tensor:
        return ops.gather_rows(x_BTD, self.index_BK)

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        return ops.scatter_rows(y_BKD, self.index_BK, self.length, fill)

    def mask(self) -> Tensor:
        return self.scatter(torch.ones_like(self.index_BK, dtype=torch.bool), False)


@dataclass(frozen=True)
class Padded(Gathered):
    """A gathered selection whose rows may keep fewer than K tokens: kept ones are valid and come first."""

    valid_BK: Tensor = field()

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        return super().scatter(_where(self.valid_BK, y_BKD, fill), fill)


@dataclass(frozen=True)
class Unpadded(Padded):
    """A padded selection for attention whose per-token layers get the kept tokens of all rows concatenated."""

    unpadding: Unpadding = field()

    def gather_unpadded(self, x_BTD: Tensor) -> Tensor:
        return self.unpadding.gather(x_BTD)

    def scatter_unpadded(self, y: Tensor) -> Tensor:
        return self.unpadding.scatter(y, self.length)


@dataclass(frozen=True)
class WholeRows(Selection):
    """Some rows, and none of the other rows' tokens. inner: what is selected of the `length` tokens of these rows."""

    rows: RowSubset
    length: int = 1
    inner: Selection = EVERYONE

    @property
    def width(self) -> int:
        return self.length if self.inner.is_all else self.inner.width

    @property
    def real_first(self) -> bool:  # type: ignore[override]
        return self.inner.is_all or self.inner.real_first

    @property
    def valid_BK(self) -> Tensor | None:  # type: ignore[override]
        return self.inner.valid_BK

    @property
    def unpadding(self) -> Unpadding | None:  # type: ignore[override]
        return self.inner.unpadding

    def gather(self, x_BTD: Tensor) -> Tensor:
        x_RTD = self.rows.gather(x_BTD)
        return x_RTD if self.inner.is_all else self.inner.gather(x_RTD)

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        return self.rows.scatter(y_BKD if self.inner.is_all else self.inner.scatter(y_BKD, fill), fill)

    def mask(self) -> Tensor:
        ones_RK = torch.ones(len(self.rows.at), self.width, dtype=torch.bool, device=self.rows.index_R.device)
        return self.scatter(ones_RK, False)

    def rows_of(self, outer: RowSubset | None) -> RowSubset | None:
        return self.rows.within(outer)


def _where(valid_BK: Tensor, y_BKD: Tensor, fill: float) -> Tensor:
    """Return y at valid columns and `fill` at the others.

    The device makes `fill`: a number copied from the host would make it wait, and no CUDA graph could hold the copy.
    """
    valid = valid_BK.view(*valid_BK.shape, *[1] * (y_BKD.dim() - 2))
    return torch.where(valid, y_BKD, y_BKD.new_full((), fill))
