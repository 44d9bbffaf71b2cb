"""The arguments of a decoder block's call by name, and the same arguments for only some of its tokens.

Shape letters: B rows, T tokens of the call, S tokens of keys, K tokens of a selection, R rows of a selection.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.core.row_subset import RowSubset
from skipstone.core.selection import Selection, WholeRows
from skipstone.core.strict import PlainDict
from skipstone.ops import reference as ops

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


class Signature:
    """The signature of `forward` of another library's decoder block, by which its arguments are told by name.

    `forward` must take the hidden states first. block: the block to inspect. cache_name: the name of the argument for
    the key-value cache; "past_key_values" for a block that takes it among its **kwargs. Raises ValueError for a block
    that takes no cache or accepts *args.
    """

    def __init__(self, block: nn.Module) -> None:
        """Inspect the block. Raises ValueError for a block that takes no cache or accepts *args."""
        self._signature = inspect.signature(type(block).forward)
        names = list(self._signature.parameters)
        kinds = {p.kind for p in self._signature.parameters.values()}
        if inspect.Parameter.VAR_POSITIONAL in kinds:
            raise ValueError(f"{type(block).__name__} takes *args, so that its arguments cannot be told by name")
        found = next((name for name in CACHE_NAMES if name in names), None)
        if found is None and inspect.Parameter.VAR_KEYWORD not in kinds:
            raise ValueError(f"{type(block).__name__} takes no cache of keys and values (no argument past_key_values)")
        self.cache_name = found or CACHE_NAMES[0]

    def named(self, block: nn.Module, x_BTD: Tensor, args: tuple[object, ...], kwargs: PlainDict) -> PlainDict:
        """Return all arguments of a call of the block by name, except the hidden states.

        block: the block, passed as `self`. x_BTD: the hidden states, [B, T, D] (rows, tokens, width). args, kwargs: the
        call's other arguments. Raises TypeError if `forward` cannot be called with them.
        """
        bound = self._signature.bind(block, x_BTD, *args, **kwargs).arguments
        values: PlainDict = {}
        for name, value in list(bound.items())[2:]:
            if self._signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
                values.update(value)
            else:
                values[name] = value
        return values


@dataclass(frozen=True)
class Subset:
    """Some of the B x T tokens of a call: R whole rows, or K tokens of every row.

    shape: (B, T). rows: the whole rows; None means that `index_BK` says which tokens. index_BK: int64 [B, K], indices
    of the K tokens among the T tokens of each row; None if `rows` is given.
    """

    shape: torch.Size  # B, T
    rows: RowSubset | None = None
    index_BK: Tensor | None = None

    @classmethod
    def of(cls, part: Selection, shape: torch.Size, device: torch.device) -> Subset:
        """Return the tokens of a call that a `Selection` (kept tokens, or whole rows) selects, as a `Subset`.

        part: the selection; if it is a `WholeRows`, all tokens of its rows are taken, whatever it selects within them.
        shape: (B, T) of the call. device: the device of the tokens.
        """
        if isinstance(part, WholeRows):
            return cls(shape, rows=part.rows)
        slot_BT = torch.arange(shape[1], device=device).expand(shape)
        return cls(shape, index_BK=part.gather(slot_BT))

    def at(self, x: Tensor, row_axis: int) -> Tensor:
        """Return x at the subset's tokens: a tensor [..., B, K, ...], or [..., R, T, ...] for whole rows.

        x: [..., B, T, ...] of any dtype, or [..., 1, T, ...] if all rows are equal, which stays as it is for whole
        rows. row_axis: the axis of rows, counted from the end (negative); the axis of tokens follows it.
        """
        axis = row_axis + x.dim()
        if self.rows is not None:
            return x if x.shape[axis] == 1 else x.index_select(axis, self.rows.index_R)
        assert self.index_BK is not None
        lead = x.shape[:axis]
        flat = x.reshape(-1, *x.shape[axis:])  # [leading axes, B or 1, T, ...]
        picked = torch.stack([ops.gather_rows(each, self.index_BK) for each in flat.unbind(0)])
        return picked.view(*lead, *picked.shape[1:])


def for_tokens(arguments: PlainDict, subset: Subset, keys_too: bool = False) -> PlainDict:
    """Return the arguments of a block's call for some of its tokens, with masks, positions and other tensors gathered.

    arguments: the block's arguments by name. subset: the tokens that the block is called with, which become the
    queries. keys_too: whether the masks also lose the columns of the other tokens, which then cannot be keys; without
    effect on whole rows. Tensors without an axis of rows followed by one of tokens, and values that are no tensors, are
    returned as they are.
    """
    return {name: _picked(name, value, subset, keys_too) for name, value in arguments.items()}


def _picked(name: str, value: Any, subset: Subset, keys_too: bool) -> Any:
    if isinstance(value, dict):
        return {key: _picked(name, item, subset, keys_too) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(_picked(name, item, subset, keys_too) for item in value)
    if not isinstance(value, Tensor):
        return value
    B, T = subset.shape
    if "mask" in name:
        return _mask(value, subset, keys_too)
    axis = {"position_embeddings": -3, "position_ids": -2}.get(name, -value.dim())
    if value.dim() < max(2, -axis) or value.shape[axis] not in (1, B) or value.shape[axis + 1] != T:
        return value
    return subset.at(value, axis)


def _mask(mask: Tensor, subset: Subset, keys_too: bool) -> Tensor:
    """Return the rows of a mask [B or 1, H or 1, T, S] that belong to the tokens of `subset` as queries.

    keys_too: whether only the columns of these tokens are kept as well. A mask of another shape is returned unchanged.
    """
    B, T = subset.shape
    if mask.dim() != 4 or mask.shape[2] != T:
        return mask
    if subset.rows is not None:
        return subset.rows.gather(mask)
    assert subset.index_BK is not None
    mask_BTHS = ops.gather_rows(mask.expand(B, -1, -1, -1).transpose(1, 2), subset.index_BK)
    if keys_too:
        mask_BTHS = ops.gather_rows(mask_BTHS.transpose(1, 3), subset.index_BK).transpose(1, 3)
    return mask_BTHS.transpose(1, 2)


def masks_of(arguments: PlainDict, change: Callable[[Tensor | None], Tensor | None]) -> PlainDict:
    """Return a copy of the arguments in which `change` has been applied to the attention mask.

    arguments: the block's arguments by name. change: a function from the value of `attention_mask`, which is None if
    there is none, to the new value.
    """
    return {**arguments, "attention_mask": change(arguments.get("attention_mask"))}


def causal_mask(mask: Tensor | None, length: int, device: torch.device) -> Tensor:
    """Return the mask unchanged or, if it is None, a causal one: bool [1, 1, T, T], True where attention is allowed.

    mask: the attention mask of a call in any form, or None. length: T, the number of tokens of the call. device: where
    the causal mask is created.
    """
    if mask is not None:
        return mask
    return torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
