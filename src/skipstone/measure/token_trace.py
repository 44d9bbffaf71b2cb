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
FORMAT = 2  # of a view's plain values; others are made anew


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
class TokenTrace:
    """A model's decisions for a sample of text, by layer and token.

    tokens: text of the first row's tokens. weight_LT: factor on the block's update, mean of attention and MLP, 0 where
    skipped. kept_LT: whether any of the update was computed. depth_T: share of all attentions and MLPs that were
    computed. routed: blocks with a depth mechanism. capacity: kept share of the tokens that reached a mechanism,
    {layer: {mechanism: share}}, over all rows. activations: of activation mechanisms, by layer, whose shares are in the
    order of `activation_names`. experts: shares of all choices by layer, of the most and the least chosen expert and of
    the no-ops together. depth: mean of the computed share over all tokens of all rows. routing: "causal"; "oracle"
    where a decision cannot be made otherwise; "forced" where it was imposed.
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

    @property
    def strongest(self) -> float:
        """The largest weight of any routed block, by magnitude."""
        return max((abs(w) for layer in self.routed for w in self.weight_LT[layer]), default=0.0)

    def to_dict(self) -> PlainDict:
        """Return plain values for JSON; layers become text, as JSON's keys are."""
        by_layer = {name: _with_keys(str, getattr(self, name)) for name in ("capacity", "experts")}
        activations = {str(layer): asdict(summary) for layer, summary in self.activations.items()}
        return {**vars(self), "routed": sorted(self.routed), **by_layer, "activations": activations}

    @classmethod
    def from_dict(cls, values: PlainMapping) -> TokenTrace:
        """Build a trace from what `to_dict` gave. Raises TypeError or ValueError for anything else."""
        by_layer = {name: _with_keys(int, values[name]) for name in ("capacity", "experts")}
        activations = {int(layer): ActivationSummary(**one) for layer, one in values["activations"].items()}
        return cls(**{**values, "routed": frozenset(values["routed"]), **by_layer, "activations": activations})


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
        """Return plain values for JSON."""
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
