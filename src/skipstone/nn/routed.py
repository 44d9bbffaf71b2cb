"""Routing for any residual block of the user's: `Routed(block, MixtureOfDepths(hidden_size, ...))`.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipstone.core.records import Records
from skipstone.core.seam import wrap
from skipstone.core.selection import EVERYONE
from skipstone.core.strict import PlainDict, unknown
from skipstone.core.tokens import PassMode, Routing, Tokens
from skipstone.ops import reference as ops


class Routed(nn.Module):
    """A residual block inside one or more depth mechanisms, the first of them outermost.

    `block` maps x [B, T, D] to a residual stream of that shape (its input included), or to a tuple that begins with
    one; it mixes tokens in order of their index if at all, and takes no cache. It is called with the kept tokens only,
    so it must not depend on T. Gates scale its whole update; tokens that a hard gate leaves out are not computed at
    all, keys and values included.

    Further arguments, positional or by name, go to the block as they are, but for tensors that have an entry for each
    token: [B or 1, T, ...] (positions, rotary tables, padding masks) and masks of pairs [B or 1, H or 1, T, T] are
    gathered like x. Tuples, lists and dicts are looked into. What the block itself slices to the length of its input,
    such as a rotary table that it owns, is then wrong; hand it over as an argument, or add positions before the blocks.
    """

    def __init__(self, block: nn.Module, *mechanisms: nn.Module) -> None:
        super().__init__()
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
        """The stream after the block, and with `return_records` what the mechanisms decided.

        routing: "oracle" sees the whole row (default in training mode and right for encoders), "causal" does not.
        real_BT: bool, False for padding. Other arguments go to the block, those of every token gathered (see the
        class). What else a block returns in a tuple is handed out as it came, of the kept tokens.
        """
        if routing not in ("oracle", "causal", None):
            raise ValueError(unknown("routing", routing, ["oracle", "causal"]))
        mode = PassMode(routing=routing or ("oracle" if self.training else "causal"), noise=self.training)
        slot_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        state: dict[str, Tensor] = {}
        for mechanism in self.mechanisms:
            state.update(mechanism.initial_state(x_BTD))  # type: ignore[operator]
        tokens = Tokens(slot_BT=slot_BT, position_BT=slot_BT, real_BT=real_BT, queries=EVERYONE, state=state, mode=mode)

        # The mechanisms narrow x and the tokens' own fields; so the arguments of every token travel by their index.
        rest: list[Any] = []

        def update(x: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
            index_BK = None if tokens.slot_BT is slot_BT else tokens.slot_BT.expand(x.shape[:2])
            given, named = arguments_of(index_BK, x_BTD.shape[:2], (args, kwargs))
            return self._update(x, tokens, given, named, rest), {}

        delta_BTD, records = wrap(update, self.mechanisms)(x_BTD, tokens)  # type: ignore[arg-type]
        stream = x_BTD + delta_BTD
        result = (stream, *rest) if rest else stream
        return (result, records) if return_records else result

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
            args, kwargs = arguments_of(part.gather(index_BT), x_BTD.shape[:2], (args, kwargs))
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


def arguments_of(index_BK: Tensor | None, shape: torch.Size, value: Any) -> Any:
    """`value`, its tensors of every token gathered to the tokens `index_BK` (None: all) of rows of `shape` [B, T]."""
    if index_BK is None:
        return value
    if isinstance(value, dict):
        return {name: arguments_of(index_BK, shape, item) for name, item in value.items()}
    if isinstance(value, tuple | list):
        return type(value)(arguments_of(index_BK, shape, item) for item in value)
    if not isinstance(value, Tensor) or value.dim() < 2 or value.shape[0] not in (1, shape[0]):
        return value
    B, T = shape
    if value.dim() == 4 and value.shape[2:] == (T, T):  # a mask of pairs: of queries and of keys
        pairs_BTHT = ops.gather_rows(value.expand(B, -1, -1, -1).transpose(1, 2), index_BK)
        return ops.gather_rows(pairs_BTHT.transpose(1, 3), index_BK).permute(0, 2, 3, 1)
    if value.shape[1] != T:
        return value
    return ops.gather_rows(value.expand(B, *value.shape[1:]), index_BK)
