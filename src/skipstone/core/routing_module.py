"""What every part that decides declares, so that block, trainer, generation and cost need to know none by name.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from skipstone.core.records import Record
from skipstone.core.strict import PlainMapping


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Where a mechanism sits. `index` counts the blocks that carry this mechanism, `count` is how many there are.

    noise_key: a number that tells this mechanism's random draws from those of all others (`core/noise.py`).
    """

    layer: int = 0
    num_layers: int = 1
    index: int = 0
    count: int = 1
    name: str = ""
    noise_key: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # here and not when it is needed: a compiler cannot follow the checksum
        object.__setattr__(self, "noise_key", zlib.crc32(f"{self.layer} {self.name}".encode()))


class RoutingModule(nn.Module):
    """A mechanism with buffers that a trainer moves once an optimizer step, never in forward.

    config: the parsed options. placement: where the module sits; its name is that of its parameters and records in a
    block. built_in: whether it is the decoder's own part, without which there would be no block (an MLP of experts),
    and nothing added to one. cast_with_model: names of the module's own parameters, buffers or children that take the
    dtype in which a model is loaded; everything else stays fp32. adapt_defaults: options that `skipstone adapt` sets
    where a recipe does not.
    """

    config: Any
    placement: Placement
    built_in = False
    cast_with_model: ClassVar[tuple[str, ...]] = ()
    adapt_defaults: ClassVar[PlainMapping] = {}

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the records of an oracle pass carry a loss."""
        return False

    @property
    def needs_masks(self) -> bool:
        """Whether the mechanism decides nothing itself, so that every call has to impose its decisions."""
        return False

    @property
    def follows_scores(self) -> bool:
        """Whether a threshold moves after the scores of training passes, so that `advance` needs `statistics`."""
        return False

    def statistics(self, record: Record) -> Tensor | None:
        """fp32 vector of what `advance` needs from one micro-batch, averaged over micro-batches and processes."""
        return None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        """Move thresholds and schedules; `progress` runs from 0 to 1 over the training."""

    def moving(self) -> dict[str, Tensor]:
        """Return the scalars that `advance` moves, by the names under which a trainer logs them (`log_name`)."""
        return {}

    def log_name(self, kind: str) -> str:
        """Return the name under which a figure of this module is logged."""
        return f"{kind}/{self.placement.layer}/{self.placement.name}"

    def decay_kind(self, name: str) -> str | None:
        """Return the kind of the module's own parameter `name` for `train.no_decay`; None for one that always decays.

        The name of a bias or norm makes it one of these; everything else of a mechanism counts as a router.
        """
        return next((kind for kind, word in (("biases", "bias"), ("norms", "norm")) if word in name), "routers")

    def empty_record(self, x_BTD: Tensor) -> Record:
        """Return the record of a call in which no token reached the mechanism."""
        raise NotImplementedError

    def not_ready_reason(self) -> str | None:
        """Return why causal decisions cannot be trusted yet, or None."""
        return None

    def build_warning(self) -> str | None:
        """Return what whoever builds the model has to know before trusting its losses, or None."""
        return None

    def require_causal(self) -> None:
        """Raise ValueError if the mechanism cannot decide without sight of later tokens, naming what can."""

    def set_identity(self) -> None:
        """Make the model behave as if the mechanism were not there, its gradients alive."""
        raise NotImplementedError

    def start_as_dense(self) -> None:
        """Prepare the mechanism for weights of a dense model that is to be adapted: nothing may change at step 0.

        A mechanism whose schedule starts by computing everything has nothing to do.
        """
        self.set_identity()

    def end_dense_start(self) -> bool:
        """Return to the options what `start_as_dense` had overridden outside the parameters; whether that was so."""
        return False

    def flops(self, tokens: float, routing: str) -> float:
        """Return matrix FLOPs of the mechanism itself in a forward pass that gives it `tokens` tokens of a row."""
        raise NotImplementedError

    def backward_flops(self, tokens: float) -> float:
        """Return those of the backward pass after an oracle forward pass: one gradient for the input, one for the
        weight.
        """
        return 2 * self.flops(tokens, "oracle")

    def cache_bytes(self, tokens: float) -> float:
        """Return the bytes that the mechanism itself keeps of a row while generating, after `tokens` tokens."""
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


def fp32_names(prefix: str, module: RoutingModule) -> list[str]:
    """Return the names of the module's parameters and floating-point buffers that stay fp32, below `prefix`."""
    cast = tuple(module.cast_with_model)
    own = [n for n, x in (*module.named_parameters(), *module.named_buffers()) if x.is_floating_point()]
    return [f"{prefix}.{n}" for n in own if not any(n == c or n.startswith(f"{c}.") for c in cast)]
