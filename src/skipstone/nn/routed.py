"""`Routed` adds routing to any residual block: `Routed(block, MixtureOfDepths(hidden_size, ...))`.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import is_dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.core.depth import DepthModule
from skipstone.core.records import Records
from skipstone.core.seam import wrap
from skipstone.core.selection import EVERYONE
from skipstone.core.strict import PlainDict, unknown
from skipstone.core.tokens import PassMode, Routing, Tokens
from skipstone.ops import reference as ops


class Routed(nn.Module):
    """Wraps any residual block in one or more depth mechanisms, such as `MixtureOfDepths(hidden_size, ...)`.

    block: maps x [B, T, D] to a residual stream of that shape (including its input), or to a tuple that begins with
    one. If it mixes tokens, it does so in order of their index; it has no cache. It is called with the kept tokens
    only, so it must not depend on T. mechanisms: the first is outermost. A gate (a mechanism that multiplies updates by
    a learned factor) scales the block's whole update; a hard gate leaves out the tokens that it skips: the block does
    not compute them, and they give no keys and values.

    Further arguments are passed to the block unchanged, except tensors with an entry for each token: [B or 1, T, ...]
    (positions, rotary tables, padding masks), [B or 1, H, T, E] (H heads of E features), [N, B or 1, T, ...] (N of
    anything) and pair masks [B or 1, H or 1, T, T] are gathered like x, also inside tuples, lists and dicts. A tensor
    that the block itself slices to the length of its input, such as its own rotary table, would be wrong; pass it as an
    argument, or add positions before the blocks.
    """

    def __init__(self, block: nn.Module, *mechanisms: nn.Module) -> None:
        super().__init__()
        if not callable(block):
            raise ValueError(f"Routed wraps a block that maps a stream to a stream, got {type(block).__name__}")
        for mechanism in mechanisms:
            if not isinstance(mechanism, DepthModule):
                got = type(mechanism).__name__
                raise ValueError(f"Routed takes depth mechanisms such as MixtureOfDepths(hidden_size), got {got}")
        self.block = block
        self.mechanisms = nn.ModuleList(mechanisms)

    def forward(
        self,
        x_BTD: Tensor,
        *args: object,
        routing: Routing | None = None,
        real_BT: Tensor | None = None,
        return_records: bool = False,
        **kwargs: object,
    ) -> Any:
        """Return the stream after the block; with `return_records`, a tuple of it and the decisions by name.

        x_BTD: the stream before the block. args, kwargs: passed to the block, gathered if they have an entry for each
        token (see the class). routing: "oracle" (decisions may look at the whole row) or "causal" (at no later token);
        None means "oracle" in training mode, else "causal". real_BT: bool, False for padding; None means that nothing
        is padding. Further items of a tuple that the block returns follow the stream, for the kept tokens only. Raises
        ValueError for a stream that is not [B, T, D], and for a block that fails because of an argument of the rows'
        length that was not gathered.
        """
        if routing not in ("oracle", "causal", None):
            raise ValueError(unknown("routing", routing, ["oracle", "causal"]))
        self._check(x_BTD)
        mode = PassMode(routing=routing or ("oracle" if self.training else "causal"), noise=self.training)
        slot_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        state: dict[str, Tensor] = {}
        for mechanism in self.mechanisms:
            state.update(mechanism.initial_state(x_BTD))  # type: ignore[operator]
        tokens = Tokens(slot_BT=slot_BT, position_BT=slot_BT, real_BT=real_BT, queries=EVERYONE, state=state, mode=mode)

        # Mechanisms select from x and the tokens' own fields only, so arguments per token are gathered by index.
        rest: list[Any] = []

        def update(x: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
            index_BK = None if tokens.slot_BT is slot_BT else tokens.slot_BT.expand(x.shape[:2])
            given, named = arguments_of(index_BK, x_BTD.shape[:2], (args, kwargs), tokens.real_BT)
            try:
                return self._update(x, tokens, given, named, rest), {}
            except RuntimeError as error:
                _explain(error, (given, named), x_BTD.shape[1], index_BK is None and tokens.queries.is_all)
                raise

        delta_BTD, records = wrap(update, self.mechanisms)(x_BTD, tokens)  # type: ignore[arg-type]
        stream = x_BTD + delta_BTD
        result = (stream, *rest) if rest else stream
        return (result, records) if return_records else result

    def _check(self, x_BTD: Tensor) -> None:
        """Raise ValueError unless x_BTD is a stream of numbers [B, T, D] with the mechanisms' width D."""
        if not isinstance(x_BTD, Tensor) or x_BTD.dim() != 3:
            got = list(x_BTD.shape) if isinstance(x_BTD, Tensor) else type(x_BTD).__name__
            raise ValueError(f"Routed takes a stream of shape [rows, tokens, width], got {got}")
        if not x_BTD.is_floating_point():
            raise ValueError(f"Routed takes a stream of floating-point numbers, got {x_BTD.dtype}")
        for mechanism in self.mechanisms:
            width = getattr(mechanism, "hidden_size", x_BTD.shape[-1])
            if width != x_BTD.shape[-1]:
                name = type(mechanism).__name__
                raise ValueError(f"{name} has hidden_size {width}, but the stream is {x_BTD.shape[-1]} wide")

    def _update(
        self, x_BTD: Tensor, tokens: Tokens, args: tuple[Any, ...], kwargs: PlainDict, rest: list[Any]
    ) -> Tensor:
        part = tokens.queries
        if part.is_empty:
            return torch.zeros_like(x_BTD)
        chosen_BKD = x_BTD
        if not part.is_all:
            index_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device).expand(x_BTD.shape[:2])
            chosen_BKD = part.gather(x_BTD)
            args, kwargs = arguments_of(part.gather(index_BT), x_BTD.shape[:2], (args, kwargs), part.valid_BK)
        out = self.block(chosen_BKD, *args, **kwargs)
        if isinstance(out, tuple):
            out, rest[:] = out[0], out[1:]
        if not isinstance(out, Tensor) or out.shape != chosen_BKD.shape:
            got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
            raise ValueError(
                f"the block must return a stream of its input's shape {list(chosen_BKD.shape)} (or a tuple that begins "
                f"with one), got {got}"
            )
        delta = part.scatter(out - chosen_BKD)
        return delta if tokens.gain_BT is None else delta * tokens.gain_BT[..., None].to(delta.dtype)


def _explain(error: RuntimeError, given: Any, length: int, whole: bool) -> None:
    """Raise ValueError if a block may have failed because of an argument with an axis of the row's length.

    given: its arguments after gathering. whole: whether the block was called with all tokens.
    """
    left = None if whole else _of_length(given, length)
    if left is not None:
        raise ValueError(
            f"the block failed for some of {length} tokens, with an argument of shape {left} that was not gathered; "
            f"pass tensors by token as [rows or 1, {length}, ...], alone or in tuples, lists and dicts: "
            f"{str(error).splitlines()[0]}"
        ) from error


def _of_length(value: Any, length: int) -> list[int] | None:
    """Return the shape of a tensor among the arguments that has an axis of this length; None if there is none."""
    if isinstance(value, Tensor):
        return list(value.shape) if length in value.shape else None
    if is_dataclass(value) or isinstance(value, SimpleNamespace):
        value = vars(value)
    items = value.values() if isinstance(value, dict) else value if isinstance(value, tuple | list) else ()
    return next((found for item in items if (found := _of_length(item, length)) is not None), None)


def arguments_of(index_BK: Tensor | None, shape: torch.Size, value: Any, valid_BK: Tensor | None = None) -> Any:
    """Return `value` with every tensor that has an entry for each token gathered to the given tokens.

    index_BK: int64, the K tokens of each row; None means all of them, and `value` is returned unchanged. shape: [B, T]
    of all tokens. value: a tensor, or a tuple, list or dict of them; anything else is returned as it is. valid_BK:
    bool, False for tokens that only fill up a row with fewer than K; gathered masks of query and key pairs hide them as
    keys. None means that all are valid.
    """
    if index_BK is None:
        return value
    if isinstance(value, dict):
        return {name: arguments_of(index_BK, shape, item, valid_BK) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [arguments_of(index_BK, shape, item, valid_BK) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if not isinstance(value, Tensor):
        return value
    B, T = shape
    if value.dim() == 4 and value.shape[2:] == (T, T) and value.shape[0] in (1, B):  # a mask of query and key pairs
        pairs_BTHT = ops.gather_rows(value.expand(B, -1, -1, -1).transpose(1, 2), index_BK)
        mask = ops.gather_rows(pairs_BTHT.transpose(1, 3), index_BK).permute(0, 2, 3, 1)
        return mask if valid_BK is None else without_keys(mask, valid_BK)
    axes = token_axes(value, shape)
    if axes is None:
        return value
    row, token = axes
    moved = value.movedim((row, token), (0, 1))
    return ops.gather_rows(moved.expand(B, *moved.shape[1:]), index_BK).movedim((0, 1), (row, token))


def token_axes(value: Tensor, shape: torch.Size) -> tuple[int, int] | None:
    """Return the axes (rows, tokens) of a tensor `value` with an entry for each token; None for any other tensor.

    shape: [B, T]. Known forms: [B or 1, T, ...], [B or 1, H, T, E] (H heads of E features), and [N, B or 1, T, ...]
    with N of something before the rows, such as the three positions of an image's tokens.
    """
    B, T = shape
    for row, token in ((0, 1), (0, 2), (1, 2)):
        if value.dim() <= token or ((row, token) == (0, 2) and value.dim() != 4):
            continue
        if value.shape[row] in (1, B) and value.shape[token] == T:
            return row, token
    return None


def without_keys(mask: Tensor, kept_BK: Tensor) -> Tensor:
    """Return an attention mask in which a key that is not kept is visible to its own query only.

    mask: [B or 1, H or 1, K, K] for H heads and K tokens, bool (True: visible) or added to scores. kept_BK: bool [B,
    K]. A token that is not kept still sees itself, so that no row of the mask hides everything.
    """
    itself = torch.eye(mask.shape[-1], dtype=torch.bool, device=mask.device)
    closed = ~(kept_BK[:, None, None, :] | itself)
    if mask.dtype == torch.bool:
        return (mask | (itself & ~kept_BK[:, None, :, None])) & ~closed
    return torch.where(closed, torch.finfo(mask.dtype).min, mask)
