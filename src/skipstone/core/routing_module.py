"""`RoutingModule`: the interface by which block, trainer, generation and cost model use any mechanism.

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
    """The position of a mechanism in the model.

    layer: its block, of `num_layers`. index: its number among the `count` blocks with this mechanism. name: its name
    within the block. noise_key: a number that separates this mechanism's random draws from all others
    (`core/noise.py`).
    """

    layer: int = 0
    num_layers: int = 1
    index: int = 0
    count: int = 1
    name: str = ""
    noise_key: int = field(init=False, compare=False)

    def __post_init__(self) -> None:
        # computed here, because torch.compile cannot trace the checksum
        object.__setattr__(self, "noise_key", zlib.crc32(f"{self.layer} {self.name}".encode()))


class RoutingModule(nn.Module):
    """The base class of everything that makes routing decisions. Thresholds and schedules move once per optimizer step,
    not in forward.

    config: the parsed options. placement: the position of the module; its name is also the name of its parameters and
    records in a block. built_in: whether it replaces a part of the decoder (an MLP of experts) instead of being added
    to one. cast_with_model: names of own parameters, buffers or children that take the dtype in which a model is
    loaded; everything else stays fp32. adapt_defaults: options that `skipstone adapt` sets if a recipe does not.
    """

    config: Any
    placement: Placement
    built_in = False
    cast_with_model: ClassVar[tuple[str, ...]] = ()
    adapt_defaults: ClassVar[PlainMapping] = {}

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether the records of an oracle pass carry an auxiliary loss."""
        return False

    @property
    def needs_masks(self) -> bool:
        """Whether the mechanism makes no decisions itself, so that every call has to pass masks."""
        return False

    @property
    def follows_scores(self) -> bool:
        """Whether a threshold follows the scores of training passes, so that `advance` needs `statistics`."""
        return False

    def statistics(self, record: Record) -> Tensor | None:
        """Return the statistics of one micro-batch for `advance`, an fp32 vector; None if it needs none.

        Callers average it over micro-batches and processes.
        """
        return None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        """Update thresholds and schedules after an optimizer step. progress: from 0 to 1 over the training."""

    def moving(self) -> dict[str, Tensor]:
        """Return the scalars that `advance` changes, by the names under which a trainer logs them (`log_name`)."""
        return {}

    def log_name(self, kind: str) -> str:
        """Return the name under which a quantity of this module is logged, such as `threshold/3/mod`."""
        return f"{kind}/{self.placement.layer}/{self.placement.name}"

    def decay_kind(self, name: str) -> str | None:
        """Return the `train.no_decay` category of the module's own parameter `name`; None if it always decays.

        Names that contain "bias" or "norm" are biases or norms; all others count as routers.
        """
        return next((kind for kind, word in (("biases", "bias"), ("norms", "norm")) if word in name), "routers")

    def empty_record(self, x_BTD: Tensor) -> Record:
        """Return the record for a call in which no token reached the mechanism."""
        raise NotImplementedError

    def not_ready_reason(self) -> str | None:
        """Return why causal decisions are not reliable yet, for example untrained thresholds; None if they are."""
        return None

    def build_warning(self) -> str | None:
        """Return a warning about the mechanism's options when a model is built; None if there is nothing to warn of."""
        return None

    def require_causal(self) -> None:
        """Raise ValueError if the mechanism cannot decide without later tokens, naming the decisions that can."""

    def set_identity(self) -> None:
        """Set the parameters so that the model behaves as if the mechanism were absent, with gradients that do not
        vanish.
        """
        raise NotImplementedError

    def start_as_dense(self) -> None:
        """Prepare the mechanism for adapting a dense model: the outputs at step 0 must equal the dense model's.

        A mechanism whose schedule starts by computing everything has nothing to do.
        """
        self.set_identity()

    def end_dense_start(self) -> bool:
        """Undo what `start_as_dense` overrode outside of the parameters; return whether there was anything to undo."""
        return False

    def flops(self, tokens: float, routing: str) -> float:
        """Return the matrix FLOPs of the mechanism itself in a forward pass that gives it `tokens` tokens of a row."""
        raise NotImplementedError

    def backward_flops(self, tokens: float) -> float:
        """Return the mechanism's FLOPs in the backward pass of an oracle pass: gradients of its input and of its
        weights.
        """
        return 2 * self.flops(tokens, "oracle")

    def cache_bytes(self, tokens: float) -> float:
        """Return the bytes that the mechanism itself caches per row while generating, after `tokens` tokens."""
        return 0


def require_causal(modules: Iterable[RoutingModule]) -> None:
    """Raise ValueError if one of these modules cannot decide without later tokens, naming the decisions that can."""
    for module in modules:
        module.require_causal()


def causal_obstacle(modules: Iterable[RoutingModule]) -> str | None:
    """Return why these modules cannot decide causally; None if all can."""
    try:
        require_causal(modules)
    except ValueError as error:
        return str(error)
    return None


def fp32_names(prefix: str, module: RoutingModule) -> list[str]:
    """Return the names, below `prefix`, of the module's parameters and floating-point buffers that stay fp32."""
    cast = tuple(module.cast_with_model)
    own = [n for n, x in (*module.named_parameters(), *module.named_buffers()) if x.is_floating_point()]
    return [f"{prefix}.{n}" for n in own if not any(n == c or n.startswith(f"{c}.") for c in cast)]
