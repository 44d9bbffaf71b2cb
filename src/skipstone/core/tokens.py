"""`Tokens`: everything about the tokens of a call except their hidden states.

Shape letters: B rows, T tokens given to this call, K tokens of a selection, N real tokens of all rows, E head size. An
axis of size 1 in place of B means that all rows are equal.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.row_subset import RowSubset, rows_pay
from skipstone.core.selection import EVERYONE, Gathered, InPlace, Padded, Selection, Unpadded, WholeRows
from skipstone.core.unpad import Unpadding, unpadding_of
from skipstone.ops import reference as ops

Routing = Literal["oracle", "causal"]
Executor = Literal["gathered", "masked"]

# Names in `Tokens.state` of the tokens' ids and of the ids before them in their rows, int64 [B, T]; -1 where a document
# begins. The decoder fills them in only if a mechanism reads ids (`DepthModule.reads_ids`).
IDS, IDS_BEFORE = "input_ids", "input_ids_before"
# The name in `Tokens.state` of what a block's update was measured to be worth, in nats, fp32 [B, T]; NaN where it was
# not measured. A trainer gives it to the decoder (`SkipstoneModel.benefits`).
BENEFIT = "benefit/{layer}"


@dataclass(frozen=True, kw_only=True)
class PassMode:
    """How a forward pass decides and executes: plain values, fixed before it starts.

    routing: "oracle" (decisions may look at the whole row, as in training) or "causal" (they look at no later token, as
    in generation). noise: whether mechanisms may draw random numbers (exploration in training). executor: "gathered"
    computes kept tokens only; "masked" computes all tokens and discards the updates of the others (slow, with the
    result that "gathered" must have). per_row_gather: whether calls with one token per row leave out the rows whose
    token is not kept. never_empty: whether at least one column is gathered even if no token is kept. single_token:
    whether the call has one token and needs no gradients, so that weights may be read in part. whole_rows: whether
    `Tokens.select_rows` may leave out rows; it may if nothing is cached.
    """

    routing: Routing = "causal"
    noise: bool = False
    executor: Executor = "gathered"
    per_row_gather: bool = False
    never_empty: bool = False
    single_token: bool = False
    whole_rows: bool = False


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """Everything about the B rows of T tokens of one call but their hidden states.

    Frozen: mechanisms pass on changed copies. slot_BT: int64, index in the row, counting padding and cached tokens;
    attention is causal by slot. position_BT: int64, for position embeddings. rotary: cos and sin [B, T, E] of the
    positions; None means no rotary embedding. document_BT: int64, document of each token in packed rows; None means one
    document per row. real_BT: bool, False for padding; None means no padding. aligned: whether padding is known to come
    last in every row. gain_BT: factor on the updates of attention and MLP; None means 1. reach: upper bound of (largest
    slot - smallest slot + 1) of a row, cached tokens included; None means that finding it would need a wait for the
    GPU. queries: tokens whose update is computed; the others only provide keys and values. rows: the cache rows that
    the tokens continue; None means all rows. unpadding: indices of the N real tokens if many are padding; projections
    and MLP then see [1, N, D], D being the width. state: named tensors [B, T] carried from block to block. forced_BT:
    bool, decisions that the caller imposes on this block; None means that its mechanisms decide. noise_seed: int64
    scalar, the seed of this pass's random numbers; None means that it is drawn when needed. first_row: int64 scalar,
    index of the first row in a larger batch, for random numbers; None means 0. memory: where a mechanism around several
    blocks may keep state of earlier calls; None means nowhere. mode: how the pass decides and executes.
    """

    slot_BT: Tensor
    position_BT: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    document_BT: Tensor | None = None
    real_BT: Tensor | None = None
    aligned: bool = False
    gain_BT: Tensor | None = None
    reach: int | None = None
    queries: Selection = EVERYONE
    rows: RowSubset | None = None
    unpadding: Unpadding | None = None
    state: Mapping[str, Tensor] = field(default_factory=dict)
    forced_BT: Tensor | None = None
    noise_seed: Tensor | None = None
    first_row: Tensor | None = None
    memory: SkipstoneCacheLayer | None = None
    mode: PassMode = PassMode()

    @property
    def length(self) -> int:
        """The number of tokens per row, T."""
        return self.slot_BT.shape[1]

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Tokens:
        """Return a copy with all tensors on another device.

        accelerate calls this for models on several devices (`device_map`). device: the device to copy to. non_blocking:
        whether the CPU may go on before the copy is complete, as far as torch allows it.
        """
        return _moved(self, lambda x: x.to(device, non_blocking=non_blocking))

    @property
    def no_queries(self) -> bool:
        """Whether it is known, without waiting for the GPU, that no token's update is to be computed."""
        return self.queries.is_empty

    def replace(self, **changes: Any) -> Tokens:
        """Return a copy with changed fields, as `dataclasses.replace`, but five times as fast.

        Several copies are made in every decoding step. changes: new values by field name.
        """
        if torch.compiler.is_compiling():
            return dataclasses.replace(self, **changes)
        assert changes.keys() <= self.__dict__.keys()
        other = object.__new__(Tokens)
        other.__dict__.update(self.__dict__, **changes)
        return other

    @property
    def group_BT(self) -> Tensor | None:
        """The group within which a top-k selection compares each token: its document's index, or -1 for padding.

        int64 [B, T]. Indices are compared within a row only, so rows may use the same ones. None if each row is one
        document without padding.
        """
        if self.real_BT is None:
            return self.document_BT
        document = self.document_BT if self.document_BT is not None else torch.zeros_like(self.slot_BT)
        return torch.where(self.real_BT, document, -1)

    def select_kept(self, kept_BT: Tensor, width: int | None = None, exact: bool = False) -> Selection:
        """Turn a bool mask of kept tokens into a selection: tokens gathered, marked in place, or whole rows.

        With `PassMode.executor` "masked", tokens are marked in place and all are computed. Else, calls of one token per
        row with `PassMode.per_row_gather` and without a width leave out the rows whose token is not kept. All other
        calls gather `width` columns of every row; if rows have one token and one column is gathered, it is marked in
        place instead. If every token is known to be kept, the selection is `EVERYONE`.

        kept_BT: never True for padding. width: the number of columns to gather; None means the largest number that a
        row keeps; finding it, or the rows, makes the CPU wait for the GPU once. exact: whether every row keeps exactly
        `width` tokens; if False, rows may keep fewer, and padding follows. With width None it is ignored and found out.
        """
        if self.mode.executor == "masked":
            return InPlace(kept_BT)
        if width is None and self.mode.per_row_gather and self.length == 1:
            return _by_row(kept_BT)
        count_B, count = kept_BT.sum(1), None
        if width is None:
            base = self.length + 1  # sum, minimum and maximum in one number: one host sync
            rest, width = divmod(int((count_B.sum() * base + count_B.amin()) * base + count_B.amax()), base)
            count, fewest = divmod(rest, base)
            exact = fewest == width
        if width == 0 and self.mode.never_empty:
            width, exact = 1, False
        if exact and width == self.length:
            return EVERYONE
        if width == self.length == 1:  # nothing to gather
            return InPlace(kept_BT)
        index_BK = ops.compact(kept_BT, width)
        if exact:
            return Gathered(index_BK, self.length)
        valid_BK = torch.arange(width, device=kept_BT.device) < count_B[:, None]
        unpadding = None if count is None else unpadding_of(index_BK, valid_BK, count, self.length)
        if unpadding is None:
            return Padded(index_BK, self.length, valid_BK)
        return Unpadded(index_BK, self.length, valid_BK, unpadding)

    def select_rows(self, kept_BT: Tensor) -> Selection:
        """Turn a bool mask of kept tokens into a selection that leaves out rows without kept tokens entirely.

        `select_kept` gathers as many columns of every row as the fullest one keeps, so an empty row would still cost as
        much as that one. kept_BT: never True for padding. The CPU waits for the GPU up to twice: for the rows, and for
        the largest number of tokens that one of them keeps. Rows stay if the pass cannot do without them
        (`PassMode.whole_rows` is False), and if `PassMode.executor` is "masked". Mechanisms that call this declare
        `selects_rows`.
        """
        if self.mode.executor == "masked" or not self.mode.whole_rows:
            return self.select_kept(kept_BT)
        total, some_B = len(kept_BT), kept_BT.any(1)
        rows = RowSubset.from_mask(some_B)
        if len(rows.at) == total or (not rows.at and self.mode.never_empty):
            return self.select_kept(kept_BT)
        if not rows.at:
            return Gathered(kept_BT.new_empty(total, 0, dtype=torch.long), self.length)
        return WholeRows(rows, self.length, self.select_kept(rows.gather(kept_BT)))

    def select(self, part: Selection) -> Tokens:
        """Return the tokens that `part` selects, in its order, with all fields gathered.

        If an outer mechanism restricts which tokens get an update (`queries`), the restriction still applies.
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
        """Return a copy with only the tokens whose update is computed; the object itself if these are all."""
        return self if self.queries.is_all else self.select(self.queries)

    def unpad(self, x_BTD: Tensor) -> Tensor:
        """Return the N real tokens of x_BTD [B, T, ...] as [1, N, ...]; if the field `unpadding` is None, x_BTD."""
        return x_BTD if self.unpadding is None else self.unpadding.unpad(x_BTD)

    def pad(self, y: Tensor) -> Tensor:
        """Return [B, T, ...] with the N real tokens y [1, N, ...] at their places, and 0 for padding.

        This is the inverse of `unpad`; if the field `unpadding` is None, y itself is returned.
        """
        return y if self.unpadding is None else self.unpadding.pad(y)

    def gather_queries(self, x_BTD: Tensor) -> Tensor:
        """Return the tokens of x_BTD [B, T, ...] whose update is computed: [B, K, ...], or [1, N, ...].

        The second form, all rows' tokens concatenated, is used where padding is left out of the layers that treat each
        token alone.
        """
        return self.unpad(x_BTD) if self.queries.is_all else self.queries.gather_unpadded(x_BTD)

    def scatter_queries(self, y: Tensor) -> Tensor:
        """Return [B, T, ...] with y at the tokens whose update is computed, else 0; inverse of `gather_queries`.

        y: values of these tokens, [B, K, ...], or [1, N, ...] where padding is left out.
        """
        return self.pad(y) if self.queries.is_all else self.queries.scatter_unpadded(y)

    def restrict_queries(
        self, kept_BT: Tensor, width: int | None = None, exact: bool = False, share: float | None = None
    ) -> Tokens:
        """Return a copy in which only some tokens get an update; the others still provide keys and values.

        kept_BT: bool, tokens to update, never True for padding; restrictions by outer mechanisms still apply, in which
        case width and exact are not used. width: the number of columns to gather; None means the largest number that a
        row keeps, for which the CPU waits for the GPU. exact: whether every row keeps exactly `width` tokens. share:
        long-run share of kept tokens, from 0 to 1; None means that 0.5 is assumed. In calls of one token per row on a
        GPU, all rows are computed if, at this share, steps in which no row keeps its token are too rare for skipping to
        save time (`rows_pay`).
        """
        if not self.queries.is_all:
            kept_BT = self.queries.and_mask(kept_BT)
            width, exact = None, False
        per_row_gather = self.mode.per_row_gather and self.mode.executor == "gathered" and self.length == 1
        if per_row_gather and not rows_pay(kept_BT.shape[0], share, kept_BT.device):
            return self.replace(queries=InPlace(kept_BT))
        return self.replace(queries=self.select_kept(kept_BT, width, exact))

    def scaled(self, gain_BT: Tensor) -> Tokens:
        """Return a copy whose updates are multiplied by gain_BT [B, T], in addition to any earlier gain."""
        return self.replace(gain_BT=gain_BT if self.gain_BT is None else self.gain_BT * gain_BT)


def real_mask(tokens: Tokens, like_BT: Tensor) -> Tensor:
    """Return a bool mask with the shape of `like_BT` that is True for real tokens and False for padding.

    tokens: the tokens of the call, which say what is padding. like_BT: any tensor [B, T] on their device.
    """
    if tokens.real_BT is None:
        return torch.ones_like(like_BT, dtype=torch.bool)
    return tokens.real_BT.expand_as(like_BT)


def _by_row(kept_B1: Tensor) -> Selection:
    """Return the selection that keeps some rows whole, for calls with one token per row. kept_B1: bool, which rows."""
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
    """Return a copy of a value with `move` applied to every tensor inside it (in tuples, mappings and dataclasses)."""
    if isinstance(value, Tensor):
        return move(value)
    if isinstance(value, tuple):
        return tuple(_moved(x, move) for x in value)
    if isinstance(value, Mapping):
        return {name: _moved(x, move) for name, x in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(value, **{f.name: _moved(getattr(value, f.name), move) for f in fields(value)})
    return value
