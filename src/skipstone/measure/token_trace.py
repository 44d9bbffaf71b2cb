"""`TokenTrace` and `ModelView`: measurements of a model as plain values for JSON, without torch.

Shape letters: T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from skipstone.core.strict import PlainDict, PlainMapping

CATEGORIES = ("letters", "digits", "signs", "white space")
COLUMNS = ("row", "position", "token", "layer", "mechanism", "score", "weight", "kept", "loss")  # of a depth map
FORMAT = 3  # of a view's plain values; others are made anew


@dataclass(frozen=True, kw_only=True)
class ActivationSummary:
    """The activations that the neurons of one layer mix.

    shares: mean share of each activation. entropy: of the mix, as a share of its maximum. strongest: for each neuron,
    the activation that its mean logits favour. by_category: shares for the tokens of each category that occurs.
    """

    shares: list[float]
    entropy: float
    strongest: list[int]
    by_category: Mapping[str, list[float]]

    def shift(self, category: str) -> float:
        """Return the total variation distance of a category's shares from those of all tokens: 0 alike, 1 disjoint."""
        return sum(abs(a - b) for a, b in zip(self.by_category[category], self.shares, strict=True)) / 2


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """A group of tokens. compute: mean share of the blocks' updates that were computed for them.

    loss: mean nats of the predictions of the tokens after them; None where there is nothing to predict.
    """

    name: str
    tokens: int
    compute: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """To which tokens the compute went, over all rows of a trace.

    correlation: of compute and loss over tokens; without_position, without_token, without_both: after the means of
    groups of positions, of equal tokens, and of both are removed from the two. None where one does not vary.
    """

    by_kind: list[TokenGroup]
    by_frequency: list[TokenGroup]
    by_position: list[TokenGroup]
    correlation: float | None
    without_position: float | None
    without_token: float | None
    without_both: float | None

    @classmethod
    def from_dict(cls, values: PlainMapping) -> Allocation:
        """Build it from plain values."""
        groups = {name: [TokenGroup(**one) for one in values[name]] for name in values if name.startswith("by_")}
        return cls(**{**values, **groups})


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """A model's decisions for a sample of text, by layer and token.

    tokens: text of the first row's tokens. weight_LT: factor on the block's update, mean of attention and MLP, 0 where
    skipped. kept_LT: whether any of the update was computed. depth_T: share of all attentions and MLPs that were
    computed. routed: blocks with a depth mechanism. capacity: kept share of the tokens that reached a mechanism,
    {layer: {mechanism: share}}, over all rows. activations: of activation mechanisms, by layer, whose shares are in the
    order of `activation_names`. experts: shares of all choices by layer, of the most and the least chosen expert and of
    the no-ops together. depth: mean of the computed share over all tokens of all rows. routing: "causal"; "oracle"
    where a decision cannot be made otherwise; "forced" where it was imposed. allocation: over all rows; None where the
    batch has no labels. flops, dense_flops: forward FLOPs per token by the cost model, of what was decided, each row by
    itself, and without mechanisms; None where the decisions are not causal.
    """

    tokens: list[str]
    weight_LT: list[list[float]]
    kept_LT: list[list[bool]]
    depth_T: list[float]
    depth: float
    routing: str
    routed: frozenset[int] = frozenset()
    capacity: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    activations: Mapping[int, ActivationSummary] = field(default_factory=dict)
    activation_names: Sequence[str] = ()
    experts: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    allocation: Allocation | None = None
    flops: float | None = None
    dense_flops: float | None = None

    @property
    def strongest(self) -> float:
        """The largest absolute weight of any routed block."""
        return max((abs(w) for layer in self.routed for w in self.weight_LT[layer]), default=0.0)

    def to_dict(self) -> PlainDict:
        """Return the trace as plain values for JSON, whose keys of layers are strings."""
        by_layer = {name: _with_keys(str, getattr(self, name)) for name in ("capacity", "experts")}
        activations = {str(layer): asdict(summary) for layer, summary in self.activations.items()}
        allocation = None if self.allocation is None else asdict(self.allocation)
        plain = {"activations": activations, "allocation": allocation}
        return {**vars(self), "routed": sorted(self.routed), **by_layer, **plain}

    @classmethod
    def from_dict(cls, values: PlainMapping) -> TokenTrace:
        """Build a trace from what `to_dict` gave. Raises TypeError or ValueError for anything else."""
        by_layer = {name: _with_keys(int, values[name]) for name in ("capacity", "experts")}
        activations = {int(layer): ActivationSummary(**one) for layer, one in values["activations"].items()}
        found = values["allocation"]
        allocation = None if found is None else Allocation.from_dict(found)
        plain = {"activations": activations, "allocation": allocation}
        return cls(**{**values, "routed": frozenset(values["routed"]), **by_layer, **plain})


Key = TypeVar("Key")
Value = TypeVar("Value")


def _with_keys(kind: Callable[[str], Key], values: Mapping[str, Value]) -> dict[Key, Value]:
    return {kind(key): value for key, value in values.items()}


@dataclass(frozen=True, kw_only=True)
class ModelView:
    """The figures of a model that a report shows.

    mechanisms: in words. set_capacity: capacities of the configuration, {layer: {mechanism: share}}. trace: of the
    first validation rows.
    """

    mechanisms: str
    set_capacity: Mapping[int, Mapping[str, float]]
    trace: TokenTrace

    def to_dict(self) -> PlainDict:
        """Return the view as plain values for JSON."""
        capacity = {str(layer): shares for layer, shares in self.set_capacity.items()}
        return {
            "format": FORMAT,
            "mechanisms": self.mechanisms,
            "set_capacity": capacity,
            "trace": self.trace.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: PlainMapping) -> ModelView | None:
        """Build a view from what `to_dict` gave; None for values of another format."""
        if values.get("format") != FORMAT:
            return None
        return cls(
            mechanisms=values["mechanisms"],
            set_capacity={int(layer): shares for layer, shares in values["set_capacity"].items()},
            trace=TokenTrace.from_dict(values["trace"]),
        )
