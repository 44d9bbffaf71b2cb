"""`TokenTrace` and `ModelView`: a model's decisions for a sample of text, and what a report shows of the model.

Both are plain values for JSON, without torch. Shape letters: T tokens, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TypeVar

from skipstone.core.strict import PlainDict, PlainMapping

CATEGORIES = ("letters", "digits", "signs", "white space")
# Of a depth map. Files of earlier releases have no "routing".
COLUMNS = ("row", "position", "token", "layer", "mechanism", "score", "weight", "kept", "loss", "routing")
FORMAT = 3  # of a view's plain values; others are made anew


@dataclass(frozen=True, kw_only=True)
class ActivationSummary:
    """The mix of activation functions in the MLP neurons of one layer.

    shares: share of each function in the mix, mean over tokens and neurons. entropy: mean entropy of a neuron's mix,
    divided by the largest possible one. strongest: for each neuron, the index of the function that is strongest if the
    logits of all tokens are averaged. by_category: the mean shares over the tokens of each category ("letters",
    "digits", "signs", "white space") that occurs. Lists of shares have the order of the field `activation_names` of
    `TokenTrace`.
    """

    shares: list[float]
    entropy: float
    strongest: list[int]
    by_category: Mapping[str, list[float]]

    def shift(self, category: str) -> float:
        """Return how far a category's mean shares are from those of all tokens, as total variation distance in [0, 1].

        0 means that they are equal, 1 that they have no function in common. category: a key of `by_category`.
        """
        return sum(abs(a - b) for a, b in zip(self.by_category[category], self.shares, strict=True)) / 2


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """A group of tokens of a trace.

    name: the group's name as shown. tokens: number of tokens. compute: the share of all blocks' attentions and MLPs
    that were computed for a token, mean over its tokens, in [0, 1]. loss: mean loss of predicting the next token, in
    nats; None where there is nothing to predict.
    """

    name: str
    tokens: int
    compute: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How compute was distributed over tokens, over all rows of a trace.

    by_kind, by_frequency, by_position: groups of tokens by kind of text (empty if it is unknown), by frequency of the
    token id, and by position in the row. correlation: Pearson's correlation over tokens between the token's loss and
    its compute, the share of all blocks' attentions and MLPs that were computed for it. without_position: the same
    correlation after subtracting from both variables their means over the token's group of positions. without_token:
    after subtracting their means over all tokens of the same id. without_both: after subtracting both; what is left of
    the correlation is explained by neither. Each is None if one of its variables is constant or there are fewer than 3
    tokens.
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
        """Build an allocation from plain values: a dict by field name, in which each group is a dict, too.

        values: what `dataclasses.asdict` returns for an allocation. Raises KeyError or TypeError for other values.
        """
        groups = {name: [TokenGroup(**one) for one in values[name]] for name in values if name.startswith("by_")}
        return cls(**{**values, **groups})


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """A model's decisions for a sample of text, by layer and token.

    L is the number of layers, T the number of tokens of the first row that are shown; _LT marks a list of L lists of T
    values. tokens: the texts of these tokens. weight_LT: factor on the block's update, the mean of attention and MLP, 0
    where both are skipped. kept_LT: whether the attention or the MLP was computed. depth_T: for each token, the
    computed share of all attentions and MLPs. depth: the mean of that share over all tokens of all rows. routing:
    "causal" (decisions look at no later token), "oracle" (they look at the whole row, for models that cannot do
    otherwise), "forced" (imposed) or "unknown". routed: indices of the blocks with a depth mechanism. capacity: kept
    share of the tokens that reached a mechanism, {layer: {mechanism: share}}, over all rows. activations: for each
    layer that mixes activation functions, by index, a summary with shares in the order of `activation_names`. experts:
    for each layer with experts, by index, the shares in all choices of the "most chosen expert", the "least chosen
    expert" and "no-ops". allocation: how compute was distributed, over all rows; None if the batch has no labels.
    flops, dense_flops: forward FLOPs per token by formulas, with the decisions (each row by itself) and without
    mechanisms; None unless routing is "causal".
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
        """The largest absolute value in `weight_LT` of any block with a depth mechanism; 0 without such a block.

        A depth mechanism chooses the tokens that a block updates, and may scale their updates by a factor (the weight).
        """
        return max((abs(w) for layer in self.routed for w in self.weight_LT[layer]), default=0.0)

    def to_dict(self) -> PlainDict:
        """Return the trace as plain values for JSON, in which layer indices that are keys become strings."""
        by_layer = {name: _with_keys(str, getattr(self, name)) for name in ("capacity", "experts")}
        activations = {str(layer): asdict(summary) for layer, summary in self.activations.items()}
        allocation = None if self.allocation is None else asdict(self.allocation)
        plain = {"activations": activations, "allocation": allocation}
        return {**vars(self), "routed": sorted(self.routed), **by_layer, **plain}

    @classmethod
    def from_dict(cls, values: PlainMapping) -> TokenTrace:
        """Build a trace from the dict that `to_dict` returns.

        Raises KeyError, TypeError or ValueError for other values.
        """
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
    """What a report shows about a model itself.

    mechanisms: the names and blocks of the model's mechanisms as text. capacities: the configured capacity of each
    depth mechanism, which is the largest share of a row's tokens that it keeps, {layer: {mechanism: share}}. trace: the
    model's decisions for the first validation rows.
    """

    mechanisms: str
    capacities: Mapping[int, Mapping[str, float]]
    trace: TokenTrace

    def to_dict(self) -> PlainDict:
        """Return the view as plain values for JSON.

        The keys are "format" (the version of this format), "mechanisms", "set_capacity" (the capacities) and "trace".
        """
        capacity = {str(layer): shares for layer, shares in self.capacities.items()}
        return {
            "format": FORMAT,
            "mechanisms": self.mechanisms,
            "set_capacity": capacity,
            "trace": self.trace.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: PlainMapping) -> ModelView | None:
        """Build a view from the dict that `to_dict` returns; None if `values` have another version's format.

        Raises KeyError, TypeError or ValueError for a dict of this version with missing or other values.
        """
        if values.get("format") != FORMAT:
            return None
        return cls(
            mechanisms=values["mechanisms"],
            capacities={int(layer): shares for layer, shares in values["set_capacity"].items()},
            trace=TokenTrace.from_dict(values["trace"]),
        )
