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

    layer: index of its block. num_layers: number of blocks of the model. index: its place among the `count` blocks that
    have this mechanism, from 0. name: its name within the block, under which its parameters are stored and its
    decisions returned. noise_key: a number derived from layer and name, which separates its random draws from those of
    others (`core/noise.py`).
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
    """The base class of all modules that make routing decisions: depth mechanisms, activations, neuron groups, experts.

    Thresholds and schedules change once per optimizer step (`advance`), never in forward. config: the parsed options.
    placement: the position in the model. built_in: whether the module replaces a part of the decoder (an MLP of
    experts, say) instead of being added to it. cast_with_model: names of its parameters, buffers or children that are
    cast to the dtype in which a model is loaded; all others stay fp32. adapt_defaults: options that `skipstone adapt`
    sets if the user's recipe (a YAML file) does not.
    """

    config: Any
    placement: Placement
    built_in = False
    cast_with_model: ClassVar[tuple[str, ...]] = ()
    adapt_defaults: ClassVar[PlainMapping] = {}

    @property
    def has_auxiliary_loss(self) -> bool:
        """Whether training passes give this mechanism an auxiliary loss, found in its record (decisions)."""
        return False

    @property
    def needs_masks(self) -> bool:
        """Whether callers must pass masks of kept tokens in every call, because the mechanism decides nothing."""
        return False

    @property
    def follows_scores(self) -> bool:
        """Whether a threshold follows the scores of training passes, so that `advance` needs the `statistics`."""
        return False

    def statistics(self, record: Record) -> Tensor | None:
        """Return what `advance` needs to know of one micro-batch, an fp32 vector; None if it needs nothing.

        An example is a quantile of the scores. record: what the mechanism decided in that forward pass. Callers average
        the vector over micro-batches and processes.
        """
        return None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        """Update thresholds and schedules after an optimizer step.

        progress: the fraction of training completed, from 0 to 1. statistics: the fp32 vector that this module's method
        `statistics` returned, averaged by the caller over the step's micro-batches and over all processes. None means
        that there is no such vector; thresholds and biases that depend on it then stay as they are.
        """

    def moving(self) -> dict[str, Tensor]:
        """Return scalar tensors that change during training, such as thresholds, by the names of their log entries."""
        return {}

    def log_name(self, kind: str) -> str:
        """Return the name of a log entry of this module: `KIND/LAYER/NAME`, such as `threshold/3/mod`.

        kind: the quantity, such as "threshold".
        """
        return f"{kind}/{self.placement.layer}/{self.placement.name}"

    def decay_kind(self, name: str) -> str | None:
        """Return the category by which recipes exempt a parameter from weight decay; None if they cannot exempt it.

        name: the name of one of this module's parameters. Recipes list categories in `train.no_decay`. By default, the
        category is "biases" or "norms" if the name contains "bias" or "norm", else "routers"; subclasses may return
        others, or None (as for the weights of experts).
        """
        return next((kind for kind, word in (("biases", "bias"), ("norms", "norm")) if word in name), "routers")

    def empty_record(self, x_BTD: Tensor) -> Record:
        """Return the record (decisions as tensors) for a call in which no token reached the mechanism.

        x_BTD: the call's hidden states, from which shape, dtype and device are taken.
        """
        raise NotImplementedError

    def not_ready_reason(self) -> str | None:
        """Return why decisions as in generation are not reliable yet, such as untrained thresholds; else None."""
        return None

    def build_warning(self) -> str | None:
        """Return a warning about the mechanism's options, shown when a model is built; None if there is none."""
        return None

    def require_causal(self) -> None:
        """Raise ValueError if the configured decisions need later tokens; the message names options that need none."""

    def set_identity(self) -> None:
        """Set parameters and schedules so that the model computes what it would without the mechanism.

        Gradients of the parameters do not vanish there, so that training can go on.
        """
        raise NotImplementedError

    def start_as_dense(self) -> None:
        """Prepare the mechanism for adapting a dense model: at step 0, the outputs must equal those of the dense model.

        By default this is `set_identity`. Mechanisms whose schedule begins by keeping everything override it to do
        nothing.
        """
        self.set_identity()

    def end_dense_start(self) -> bool:
        """End the state after `start_as_dense`, in which the model computes exactly what the dense one does.

        Options that `start_as_dense` overrode, such as the capacity, get their configured values; parameters stay as
        they are. Returns whether anything was restored.
        """
        return False

    def flops(self, tokens: float, routing: str) -> float:
        """Return the FLOPs of the mechanism's own matrix products in a forward pass, without the block that it wraps.

        tokens: tokens of one row that reach the mechanism; the result is for that row. routing: "oracle" for a training
        pass, "causal" for one that decides as in generation.
        """
        raise NotImplementedError

    def backward_flops(self, tokens: float) -> float:
        """Return the FLOPs of the mechanism's own matrix products in the backward pass of a training step.

        These are the gradients of its input and of its weights: by default twice the forward FLOPs. tokens: tokens of
        one row that reach the mechanism.
        """
        return 2 * self.flops(tokens, "oracle")

    def cache_bytes(self, tokens: float) -> float:
        """Return how many bytes of its own state the mechanism caches for one row in generation.

        tokens: tokens of the row that have reached the mechanism.
        """
        return 0


def require_causal(modules: Iterable[RoutingModule]) -> None:
    """Raise ValueError if one of these modules needs later tokens to decide; the message names options that need none.

    modules: routing modules, which are asked in their order; the first that needs later tokens raises.
    """
    for module in modules:
        module.require_causal()


def causal_obstacle(modules: Iterable[RoutingModule]) -> str | None:
    """Return in words why one of these modules cannot decide without later tokens; None if all of them can."""
    try:
        require_causal(modules)
    except ValueError as error:
        return str(error)
    return None


def fp32_names(prefix: str, module: RoutingModule) -> list[str]:
    """Return the names of the module's parameters and floating-point buffers that stay fp32 when a model is cast.

    prefix: the module's own name in the model; the names returned begin with it.
    """
    cast = tuple(module.cast_with_model)
    own = [n for n, x in (*module.named_parameters(), *module.named_buffers()) if x.is_floating_point()]
    return [f"{prefix}.{n}" for n in own if not any(n == c or n.startswith(f"{c}.") for c in cast)]
