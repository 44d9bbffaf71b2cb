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
    """Some tokens of each row, in order, with gather and scatter operations; subclasses define the layout in memory.

    B rows, T tokens of the call, K columns of the selection. is_all: whether every token is known to be selected,
    without waiting for the GPU. real_first: whether the selected tokens are known to fill each row from the left, so
    that causal attention over them needs no mask. valid_BK: bool, which columns hold a selected token; None means that
    all do. unpadding: indices of the selected tokens of all rows, set if enough columns are padding; None means that
    per-token layers compute the padding too.
    """

    is_all = False
    real_first = False
    valid_BK: Tensor | None = None
    unpadding: Unpadding | None = None

    @property
    def width(self) -> int:
        """The number of columns, K: at least as many as the row with the most selected tokens needs."""
        raise NotImplementedError

    @property
    def is_empty(self) -> bool:
        """Whether it is known, without waiting for the GPU, that no token is selected; False if it is not known."""
        return self.width == 0

    def gather(self, x_BTD: Tensor) -> Tensor:
        """Return the selected tokens, [B, K, ...], of x_BTD [B, T, ...].

        Columns in which `valid_BK` is False get the values of other tokens.
        """
        raise NotImplementedError

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        """Return [B, T, ...] with y_BKD at the selected tokens and `fill` elsewhere; inverse of `gather`."""
        raise NotImplementedError

    def mask(self) -> Tensor:
        """Return a bool mask [B, T] that is True at the selected tokens."""
        raise NotImplementedError

    def gather_unpadded(self, x_BTD: Tensor) -> Tensor:
        """Return the N selected tokens of all rows concatenated, [1, N, ...].

        x_BTD: [B, T, ...]. If `unpadding` is None, the result is that of `gather`, [B, K, ...].
        """
        return self.gather(x_BTD)

    def scatter_unpadded(self, y: Tensor) -> Tensor:
        """Return [B, T, ...] with y at the selected tokens and 0 at all others; inverse of `gather_unpadded`.

        y: values of the N selected tokens of all rows, [1, N, ...]; if `unpadding` is None, of the K columns of each
        row, [B, K, ...].
        """
        return self.scatter(y)

    def and_mask(self, kept_BT: Tensor) -> Tensor:
        """Return a bool mask [B, T] that is True where a token is selected and `kept_BT` is True."""
        return kept_BT & self.mask()

    def merge(self, new_BKD: Tensor, old_BTD: Tensor) -> Tensor:
        """Return a copy of `old_BTD`, one value per token [B, T], with `new_BKD` [B, K] at the selected tokens.

        For `Everyone`, the selection of all tokens, the result is `new_BKD` itself.
        """
        return torch.where(self.mask(), self.scatter(new_BKD), old_BTD)

    def rows_of(self, outer: RowSubset | None) -> RowSubset | None:
        """Return which rows of the cache hold the tokens of this selection; None means all rows.

        outer: the rows of the cache that the B rows of the call stand for, if the call itself has only some of the
        batch's rows; None means all. Only a selection that leaves out whole rows returns something else than `outer`.
        """
        return outer


class Everyone(Selection):
    """The selection of all tokens of the call; gather and scatter return their argument."""

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
    """A selection that leaves all tokens where they are (K = T) and marks the selected ones.

    valid_BK: bool, True at the selected tokens.
    """

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
    """A selection of exactly K tokens in every row, copied next to each other.

    index_BK: int64 [B, K], the tokens' indices among the T tokens of their row, ascending. length: T.
    """

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
    """A gathered selection whose rows may select fewer than K tokens; these come first, and padding follows.

    index_BK: int64 [B, K], the tokens' indices among the T tokens of their row, ascending; of padding, the index of
    some token that is not selected. length: T. valid_BK: bool [B, K], False for padding.
    """

    valid_BK: Tensor = field()

    def scatter(self, y_BKD: Tensor, fill: float = 0.0) -> Tensor:
        return super().scatter(_where(self.valid_BK, y_BKD, fill), fill)


@dataclass(frozen=True)
class Unpadded(Padded):
    """A padded selection of which only attention sees the padding; other layers get all rows' tokens concatenated.

    index_BK: int64 [B, K], the tokens' indices among the T tokens of their row, ascending; of padding, the index of
    some token that is not selected. valid_BK: bool [B, K], False for padding. length: T. unpadding: indices of the N
    selected tokens, for the conversion to [1, N, ...].
    """

    unpadding: Unpadding = field()

    def gather_unpadded(self, x_BTD: Tensor) -> Tensor:
        return self.unpadding.gather(x_BTD)

    def scatter_unpadded(self, y: Tensor) -> Tensor:
        return self.unpadding.scatter(y, self.length)


@dataclass(frozen=True)
class WholeRows(Selection):
    """A selection that leaves out whole rows: some rows, and within these the tokens of another selection.

    rows: the R rows that remain. length: T. inner: the selection within the remaining rows; the default selects all
    their tokens. What is gathered has R rows in place of B.
    """

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
    """Return y_BKD with `fill` in place of the columns where valid_BK is False.

    The device makes `fill`: a number copied from the host would make it wait, and no CUDA graph could hold the copy.
    """
    valid = valid_BK.view(*valid_BK.shape, *[1] * (y_BKD.dim() - 2))
    return torch.where(valid, y_BKD, y_BKD.new_full((), fill))
