"""Who the tokens are: everything about them but their hidden states.

Shape letters: B rows, T tokens given to this call, K tokens of a selection, E head size.
An axis of size 1 in place of B means that all rows agree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from skipstone.core.row_subset import RowSubset, rows_pay
from skipstone.core.selection import EVERYONE, Gathered, InPlace, Padded, Selection, Unpadded, WholeRows
from skipstone.core.unpad import Unpadding, unpadding_of
from skipstone.ops import reference as ops

Routing = Literal["oracle", "causal"]
Executor = Literal["gathered", "masked"]


@dataclass(frozen=True, kw_only=True)
class PassMode:
    """How this forward pass decides and executes: plain values, known before it starts.

    routing: "oracle" may look at the whole row (training); "causal" is what generation can do.
    noise: whether mechanisms may draw random numbers. executor: "gathered" computes kept tokens only, "masked" computes
    all and throws away (the specification that the gathered one must equal). per_row_gather: where each row has one
    token, the gathered executor computes some rows and leaves the others out; what is called with them must then expect
    fewer rows. never_empty: a gathered selection has at least one column, even if no token is kept. single_token: the
    call has one token and no gradients, as in decoding one row, so that weights may be read in part.
    """

    routing: Routing = "causal"
    noise: bool = False
    executor: Executor = "gathered"
    per_row_gather: bool = False
    never_empty: bool = False
    single_token: bool = False


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """The tokens of one call. Frozen: mechanisms pass on narrowed or changed copies.

    slot_BT: int64, index in the row, padding and cached tokens counted; attention is causal by slot.
    position_BT: int64, what position embeddings see; never renumbered.
    rotary: cos and sin [B, T, E] of the positions, or None.
    document_BT: int64 document of each token, or None for one document a row (known without looking).
    real_BT: bool, False for padding, or None where every token is real (known without looking).
    aligned: real tokens are known to come first in every row.
    gain_BT: factor on both sub-layers' updates, or None for 1.
    queries: the tokens whose update is computed; the others still serve as keys and values.
    rows: the rows of the cache that these tokens continue. None: all.
    unpadding: where the real ones stand, if much is padding. Projections and MLP then see them unpadded, [1, N, D].
    state: named tensors [B, T] that cross blocks, made before block 0.
    forced_BT: bool, the decision that the caller imposes on this block, or None.
    noise_seed: int64 [], the seed of this forward pass's random numbers (`core/noise.py`); None: drawn where needed.
    """

    slot_BT: Tensor
    position_BT: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    document_BT: Tensor | None = None
    real_BT: Tensor | None = None
    aligned: bool = False
    gain_BT: Tensor | None = None
    queries: Selection = EVERYONE
    rows: RowSubset | None = None
    unpadding: Unpadding | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    forced_BT: Tensor | None = None
    noise_seed: Tensor | None = None
    mode: PassMode = PassMode()

    @property
    def length(self) -> int:
        return self.slot_BT.shape[1]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Tokens:
        """On another device: accelerate calls this where a model's blocks lie on several (`device_map`)."""
        return _moved(self, lambda x: x.to(device, non_blocking=non_blocking))

    @property
    def no_queries(self) -> bool:
        """Whether the update of no token is computed, known without looking."""
        return self.queries.is_empty

    def replace(self, **changes: Any) -> Tokens:
        """`dataclasses.replace`, five times as fast: a gated block makes two or three of these in a decoding step."""
        if torch.compiler.is_compiling():
            return dataclasses.replace(self, **changes)
        assert changes.keys() <= self.__dict__.keys()
        other = object.__new__(Tokens)
        other.__dict__.update(self.__dict__, **changes)
        return other

    @property
    def group_BT(self) -> Tensor | None:
        """Document of each token with -1 for padding, as `select_top` wants it; None for one whole document a row."""
        if self.real_BT is None:
            return self.document_BT
        document = self.document_BT if self.document_BT is not None else torch.zeros_like(self.slot_BT)
        return torch.where(self.real_BT, document, -1)

    def select_kept(self, kept_BT: Tensor, width: int | None = None, exact: bool = False) -> Selection:
        """Turn a decision into a selection for this call's executor.

        `width` is the number of columns to gather where it is known beforehand; without it the largest row is counted,
        which makes the host wait once. `exact`: every row keeps exactly `width`.
        """
        if self.mode.executor == "masked":
            return InPlace(kept_BT)
        if width is None and self.mode.per_row_gather and self.length == 1:
            return _by_row(kept_BT)
        count_B, count = kept_BT.sum(1), None
        if width is None:
            base = self.length + 1  # three numbers for one host sync
            rest, width = divmod(int((count_B.sum() * base + count_B.amin()) * base + count_B.amax()), base)
            count, fewest = divmod(rest, base)
            exact = fewest == width
        if width == 0 and self.mode.never_empty:
            width, exact = 1, False
        if exact and width == self.length:
            return EVERYONE
        if width == self.length == 1:  # one column, which holds every row
            return InPlace(kept_BT)
        index_BK = ops.compact(kept_BT, width)
        if exact:
            return Gathered(index_BK, self.length)
        valid_BK = torch.arange(width, device=kept_BT.device) < count_B[:, None]
        unpadding = None if count is None else unpadding_of(index_BK, valid_BK, count, self.length)
        if unpadding is None:
            return Padded(index_BK, self.length, valid_BK)
        return Unpadded(index_BK, self.length, valid_BK, unpadding)

    def select(self, part: Selection) -> Tokens:
        """The tokens of `part`, in its order. An outer mechanism's queries stay queries in the new coordinates.

        Only real tokens are ever kept, so within a selection the valid entries are the real ones.
        """
        if part.is_all:
            return self
        narrowed = self.replace(
            slot_BT=part.gather(self.slot_BT),
            position_BT=part.gather(self.position_BT),
            rotary=None if self.rotary is None else (part.gather(self.rotary[0]), part.gather(self.rotary[1])),
            document_BT=None if self.document_BT is None else part.gather(self.document_BT),
            real_BT=part.valid_BK,
            aligned=part.real_first or self.length == 1,
            gain_BT=None if self.gain_BT is None else part.gather(self.gain_BT),
            forced_BT=None if self.forced_BT is None else part.gather(self.forced_BT),
            state={name: part.gather(value) for name, value in self.state.items()},
            queries=EVERYONE,
            rows=part.rows_of(self.rows),
            unpadding=part.unpadding,
        )
        if self.queries.is_all or self.queries is part:
            return narrowed
        queries_BK = part.gather(self.queries.mask())
        return narrowed.restrict_queries(queries_BK if part.valid_BK is None else queries_BK & part.valid_BK)

    def query_tokens(self) -> Tokens:
        """The tokens whose update is computed, and only those."""
        return self if self.queries.is_all else self.select(self.queries)

    def unpad(self, x_BTD: Tensor) -> Tensor:
        """x of the real tokens, [1, N, ...], if there is an unpadding; else x itself."""
        return x_BTD if self.unpadding is None else self.unpadding.unpad(x_BTD)

    def pad(self, y: Tensor) -> Tensor:
        """Undoes `unpad`, with 0 for padding."""
        return y if self.unpadding is None else self.unpadding.pad(y)

    def gather_queries(self, x_BTD: Tensor) -> Tensor:
        """x of the query tokens, unpadded."""
        return self.unpad(x_BTD) if self.queries.is_all else self.queries.gather_unpadded(x_BTD)

    def scatter_queries(self, y: Tensor) -> Tensor:
        """Undoes `gather_queries`, with 0 for all others."""
        return self.pad(y) if self.queries.is_all else self.queries.scatter_unpadded(y)

    def restrict_queries(
        self, kept_BT: Tensor, width: int | None = None, exact: bool = False, share: float | None = None
    ) -> Tokens:
        """Compute the update of these tokens only; restrictions of outer mechanisms still apply.

        `width` and `exact` as in `select_kept`. share: the share of tokens kept in the long run, if it is known.
        Where each row decides for itself and this share makes a block that no row needs too rare for the check to pay,
        all rows are computed.
        """
        if not self.queries.is_all:
            kept_BT = self.queries.and_mask(kept_BT)
            width, exact = None, False
        per_row_gather = self.mode.per_row_gather and self.mode.executor == "gathered" and self.length == 1
        if per_row_gather and not rows_pay(kept_BT.shape[0], share, kept_BT.device):
            return self.replace(queries=InPlace(kept_BT))
        return self.replace(queries=self.select_kept(kept_BT, width, exact))

    def scaled(self, gain_BT: Tensor) -> Tokens:
        """With this factor on the updates, on top of any that is there."""
        return self.replace(gain_BT=gain_BT if self.gain_BT is None else self.gain_BT * gain_BT)


def real_mask(tokens: Tokens, like_BT: Tensor) -> Tensor:
    """bool [B, T]: the real tokens."""
    if tokens.real_BT is None:
        return torch.ones_like(like_BT, dtype=torch.bool)
    return tokens.real_BT.expand_as(like_BT)


def _by_row(kept_B1: Tensor) -> Selection:
    """Rows instead of tokens: no row waits for another, and a row alone has no width to be filled up to."""
    total = len(kept_B1)
    if total == 1:
        count = int(kept_B1.item())  # the host waits here, or for the rows
    else:
        rows = RowSubset.from_mask(kept_B1[:, 0])
        count = len(rows.at)
    if count == total:
        return EVERYONE
    return WholeRows(rows) if count else Gathered(kept_B1.new_empty(total, 0, dtype=torch.long), 1)


def _moved(value: Any, move: Callable[[Tensor], Tensor]) -> Any:
    """`value` with every tensor inside it moved."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(_moved(x, move) for x in value)
    if isinstance(value, Mapping):
        return {name: _moved(x, move) for name, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _moved(getattr(value, f.name), move) for f in fields(value)})
    return value
