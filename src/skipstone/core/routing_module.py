"""What every part that decides declares, so that block, trainer, generation and cost need to know none by name.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor, nn

from skipstone.core.records import Record


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a mechanism sits. `index` counts the blocks that carry this mechanism, `count` is how many there are."""

    layer: int = 0
    num_layers: int = 1
    index: int = 0
    count: int = 1
    name: str = ""


class RoutingModule(nn.Module):
    """A mechanism with buffers that a trainer moves once an optimizer step, never in forward.

    placement: where it sits; its name is that of its parameters and records in a block. built_in: whether it is the
    decoder's own part, without which there would be no block (an MLP of experts), not something added to one.
    """

    placement: Placement
    built_in = False

    def statistics(self, record: Record) -> Tensor | None:
        """fp32 vector of what `advance` needs from one micro-batch, averaged over micro-batches and processes."""
        return None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        """Move thresholds and schedules; `progress` runs from 0 to 1 over the training."""

    def empty_record(self, x_BTD: Tensor) -> Record:
        """The record of a call in which no token reached the mechanism."""
        raise NotImplementedError

    def not_ready_reason(self) -> str | None:
        """Why causal decisions cannot be trusted yet, or None."""
        return None

    def build_warning(self) -> str | None:
        """What whoever builds the model has to know before trusting its losses, or None."""
        return None

    def require_causal(self) -> None:
        """Raise ValueError if the mechanism cannot decide without sight of later tokens, naming what can."""

    def set_identity(self) -> None:
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


def require_causal(modules: Iterable[RoutingModule]) -> None:
    """Raise ValueError if one of these modules cannot decide without sight of later tokens, naming what can."""
    for module in modules:
        module.require_causal()


def causal_obstacle(modules: Iterable[RoutingModule]) -> str | None:
    """Return why these modules have no causal form of their decisions, or None if all have one."""
    try:
        require_causal(modules)
    except ValueError as error:
        return str(error)
    return None
