"""Routing for any residual block of the user's: `Routed(block, MixtureOfDepths(hidden_size, ...))`.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from skipstone.core.records import Records
from skipstone.core.seam import wrap
from skipstone.core.strict import unknown
from skipstone.core.tokens import PassMode, Routing, Tokens


class Routed(nn.Module):
    """A residual block inside one or more depth mechanisms, the first of them outermost.

    `block` maps x [B, T, D] to a residual stream of that shape (its input included), mixes tokens in order of their
    index if at all, and takes no cache. It is called with the kept tokens only, so it must not depend on T. Gates scale
    its whole update; tokens that a hard gate leaves out are not computed at all, keys and values included.

    Where it differs from the decoder's own blocks: positions that the block itself adds (rotary angles) are those of
    the gathered rows; add positions before the blocks.
    """

    def __init__(self, block: nn.Module, *mechanisms: nn.Module) -> None:
        super().__init__()
        self.block = block
        self.mechanisms = nn.ModuleList(mechanisms)

    def forward(
        self,
        x_BTD: Tensor,
        *args: Any,
        routing: Routing | None = None,
        real_BT: Tensor | None = None,
        return_records: bool = False,
        **kwargs: Any,
    ) -> Any:
        """The stream after the block, and with `return_records` what the mechanisms decided.

        routing: "oracle" sees the whole row (default in training mode and right for encoders), "causal" does not.
        real_BT: bool, False for padding. Other arguments go to the block unchanged.
        """
        if routing not in ("oracle", "causal", None):
            raise ValueError(unknown("routing", routing, ["oracle", "causal"]))
        mode = PassMode(routing=routing or ("oracle" if self.training else "causal"), noise=self.training)
        slot_BT = torch.arange(x_BTD.shape[1], device=x_BTD.device)[None]
        state: dict[str, Tensor] = {}
        for mechanism in self.mechanisms:
            state.update(mechanism.initial_state(x_BTD))  # type: ignore[operator]
        tokens = Tokens(slot_BT=slot_BT, position_BT=slot_BT, real_BT=real_BT, state=state, mode=mode)

        def update(x: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
            return self._update(x, tokens, args, kwargs), {}

        delta_BTD, records = wrap(update, self.mechanisms)(x_BTD, tokens)  # type: ignore[arg-type]
        return (x_BTD + delta_BTD, records) if return_records else x_BTD + delta_BTD

    def _update(self, x_BTD: Tensor, tokens: Tokens, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        part = tokens.queries
        if part is not None and part.width == 0:
            return torch.zeros_like(x_BTD)
        chosen_BKD = x_BTD if part is None else part.gather(x_BTD)
        delta = self.block(chosen_BKD, *args, **kwargs) - chosen_BKD
        delta = delta if part is None else part.scatter(delta)
        return delta if tokens.gain_BT is None else delta * tokens.gain_BT[..., None].to(delta.dtype)
