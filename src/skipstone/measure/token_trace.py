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
    """The mix of activation functions in the MLP neurons of one layer.

    shares: mean share of each function. entropy: mean entropy of the mix, as a share of its maximum. strongest: for
    each neuron, the index of the function that it prefers for the mean logits of all tokens. by_category: mean shares
    for the tokens of each category of text (letters, digits, signs, white space) that occurs.
    """

    shares: list[float]
    entropy: float
    strongest: list[int]
    by_category: Mapping[str, list[float]]

    def shift(self, category: str) -> float:
        """Return the total variation distance between the mean shares of a category's tokens and those of all tokens.

        0 means that they are equal, 1 that they have no function in common. category: a key of `by_category`.
        """
        return sum(abs(a - b) for a, b in zip(self.by_category[category], self.shares, strict=True)) / 2


@dataclass(frozen=True, kw_only=True)
class TokenGroup:
    """A group of tokens of a trace.

    name: the group's name as shown. tokens: number of tokens. compute: mean share of the blocks' computation that was
    executed for them, in [0, 1]. loss: mean loss of predicting the next token, in nats; None where there is nothing to
    predict.
    """

    name: str
    tokens: int
    compute: float
    loss: float | None


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How compute was distributed over tokens, over all rows of a trace.

    by_kind, by_frequency, by_position: groups of tokens by kind of text (empty if unknown), by frequency of the token
    id and by position in the row. correlation: Pearson's correlation over tokens of the token's loss with the share of
    the blocks' dense FLOPs that was computed for it. without_position, without_token, without_both: the same after
    subtracting from both variables the mean of each group of positions, of each token id, or of both; this is the
    correlation that these do not explain. None where a variable is constant.
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
        """Build an allocation from plain values, as `dataclasses.asdict` gives them."""
        groups = {name: [TokenGroup(**one) for one in values[name]] for name in values if name.startswith("by_")}
        return cls(**{**values, **groups})


@dataclass(frozen=True, kw_only=True)
class TokenTrace:
    """A model's decisions for a sample of text, by layer and token. T: tokens of the first row shown, L: layers.

    tokens: text of the first row's tokens. weight_LT: factor on the block's update, mean of attention and MLP, 0 where
    skipped. kept_LT: whether the attention or the MLP was computed. depth_T: share of all attentions and MLPs that were
    computed. depth: the mean of that share over all tokens of all rows. routing: "causal" (decisions look at no later
    token), "oracle" (at the whole row, for models that cannot do otherwise) or "forced" (imposed). routed: blocks with
    a depth mechanism. capacity: kept share of the tokens that reached a mechanism, {layer: {mechanism: share}}, over
    all rows. activations: summaries, by layer, of layers that mix activation functions, with shares in the order of
    `activation_names`. experts: by layer, the shares of "most chosen expert", "least chosen expert" and "no-ops" in all
    choices. allocation: over all rows; None if the batch has no labels. flops, dense_flops: forward FLOPs per token by
    the cost model, as decided (each row by itself) and without mechanisms; None unless routing is "causal".
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
        """The largest absolute weight of any block with a depth mechanism; 0 without one."""
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

    mechanisms: the names and blocks of the model's mechanisms as text. capacities: configured ones (largest
    shares of tokens that blocks keep), {layer: {mechanism: share}}. trace: the model's decisions for the first
    validation rows.
    """

    mechanisms: str
    capacities: Mapping[int, Mapping[str, float]]
    trace: TokenTrace

    def to_dict(self) -> PlainDict:
        """Return the view as plain values for JSON, including the version of their format."""
        capacity = {str(layer): shares for layer, shares in self.capacities.items()}
        return {
            "format": FORMAT,
            "mechanisms": self.mechanisms,
            "set_capacity": capacity,
            "trace": self.trace.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: PlainMapping) -> ModelView | None:
        """Build a view from the dict that `to_dict` returns; None if `values` have another version's format."""
        if values.get("format") != FORMAT:
            return None
        return cls(
            mechanisms=values["mechanisms"],
            capacities={int(layer): shares for layer, shares in values["set_capacity"].items()},
            trace=TokenTrace.from_dict(values["trace"]),
        )
