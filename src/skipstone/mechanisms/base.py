"""What every mechanism declares, so that block, cache, decoder, trainer, generation and cost need to know none by name.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipstone.core.load import Load
from skipstone.core.records import DepthRecord, Record, Records
from skipstone.core.seam import Update
from skipstone.core.strict import from_dict
from skipstone.core.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a mechanism sits. `index` counts the blocks that carry this mechanism, `count` is how many there are."""

    layer: int = 0
    num_layers: int = 1
    index: int = 0
    count: int = 1
    name: str = ""


class Adjustable(nn.Module):
    """A mechanism with buffers that a trainer moves once an optimizer step, never in forward."""

    def statistics(self, record: Record) -> Tensor | None:
        """fp32 vector of what `advance` needs from one micro-batch, averaged over micro-batches and processes."""
        return None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        """Move thresholds and schedules; `progress` runs from 0 to 1 over the training."""

    def unasked(self, x_BTD: Tensor) -> Record:
        """The record of a call in which no token reached the mechanism."""
        raise NotImplementedError

    def unready(self) -> str | None:
        """Why causal decisions cannot be trusted yet, or None."""
        return None

    def require_causal(self) -> None:
        """Raise ValueError if the mechanism cannot decide without sight of later tokens, naming what can."""

    def neutral(self) -> None:
        """Make the model behave as if the mechanism were not there, its gradients alive."""
        raise NotImplementedError

    def flops(self, tokens: float, routing: str) -> float:
        """Matrix FLOPs of the mechanism itself in one forward pass that gives it `tokens` tokens of a row."""
        raise NotImplementedError

    def backward_flops(self, tokens: float) -> float:
        """The same of the backward pass after an oracle forward pass: a gradient for the input, one for the weight."""
        return 2 * self.flops(tokens, "oracle")

    def cache_bytes(self, tokens: float) -> float:
        """Bytes that the mechanism itself keeps of a row while generating, after `tokens` tokens."""
        return 0


class DepthMechanism(Adjustable):
    """Decides which tokens get an update, and how strongly: a function on updates.

    Subclasses name a frozen keyword-only dataclass `Config`; options given to the constructor go through it.
    """

    Config: ClassVar[type[Any]]

    def __init__(self, hidden_size: int, place: Place | None = None, **options: Any) -> None:
        super().__init__()
        self.config = from_dict(self.Config, options)
        self.hidden_size, self.place = hidden_size, place or Place()

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        raise NotImplementedError

    def initial_state(self, x_BTD: Tensor) -> dict[str, Tensor]:
        """Tensors [B, T] that cross blocks, as they are before block 0."""
        return {}

    def unasked(self, x_BTD: Tensor) -> DepthRecord:
        zero_BT = x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.float32)
        return DepthRecord(zero_BT + float("nan"), zero_BT > 0, zero_BT, zero_BT > 0)

    def narrow(self, load: Load, kept: Load | float | None = None, oracle: bool = False) -> Load:
        """The load inside, by what was measured (`kept`: those that it keeps), else as the configuration promises.

        What is not kept stays inside as keys and values, and an oracle pass skips nothing; others override this.
        """
        if oracle or kept is None:
            return load
        return Load(given=load.given, asked=load.of(kept).asked)

    def record(self, **values: Any) -> Records:
        return {self.place.name or type(self).__name__: DepthRecord(**values)}


def every(tokens: Tokens, like_BT: Tensor) -> Tensor:
    """bool [B, T]: the real tokens."""
    if tokens.real_BT is None:
        return torch.ones_like(like_BT, dtype=torch.bool)
    return tokens.real_BT.expand_as(like_BT)
