"""The gated and the plain MLP of a block, and activations whose functions are fixed, not chosen by a router.

Tokens are unpadded, [1, N, D] instead of [B, T, D], if `tokens.unpadding` is set.

Shape letters: B rows, T tokens, D width, F neurons.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import Records
from skipstone.core.stream_gate import Functions
from skipstone.core.strict import choose
from skipstone.core.tokens import Tokens
from skipstone.core.weights import weights_multiplied
from skipstone.core.width import Activation, FeedForward
from skipstone.nn.linear import OutputLinear
from skipstone.ops.neurons import Runs
from skipstone.ops.reference import autocast, dropped


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


def _squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (Primer, arXiv 2109.08668)."""
    return F.relu(x).square()


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "relu2": _squared_relu,
    "tanh": torch.tanh,
}


class FixedActivation(Activation):
    """An activation that applies one function to every neuron.

    name: "silu", "gelu", "gelu_tanh", "relu", "relu2" (the square of ReLU) or "tanh".
    """

    by_token = True

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.function = name, FUNCTIONS[name]

    def forward(
        self,
        gate_BTF: Tensor,
        x_BTD: Tensor,
        tokens: Tokens,
        cache: SkipstoneCacheLayer | None = None,
        runs: Runs | None = None,
    ) -> tuple[Tensor, Records]:
        return self.function(gate_BTF), {}

    def stream_mix(self) -> Functions:
        return Functions(((self.name, None),))

    def extra_repr(self) -> str:
        return self.name


Groups = dict[str, int | float]


@dataclass(frozen=True, kw_only=True)
class FixedMixConfig:
    """The options of a fixed mix of activations: how many neurons use each function.

    groups: numbers of neurons by function, `{silu: 96, gelu: 32}`, or shares, `{silu: 0.75, gelu: 0.25}`; a list has
    one such mapping for each layer. Neurons of one function are adjacent, and functions are in alphabetical order.
    Raises ValueError for unknown functions, negative numbers, and shares that do not add up to 1. That numbers add up
    to the neurons of the MLP is checked by `require`.
    """

    groups: Groups | list[Groups]

    def __post_init__(self) -> None:
        for groups in [self.groups] if isinstance(self.groups, dict) else self.groups:
            shares = any(isinstance(count, float) for count in groups.values())
            for name, count in groups.items():
                choose("function in groups", name, FUNCTIONS)
                if isinstance(count, bool) or not (
                    0 <= count <= 1 if shares else isinstance(count, int) and count >= 0
                ):
                    what = "share of neurons, as another one is" if shares else "number of neurons"
                    raise ValueError(f"groups.{name} must be a {what}, got {count!r}")
            if shares and not math.isclose(sum(groups.values()), 1):
                raise ValueError(f"groups must be shares that add up to 1, got {sum(groups.values()):g}")

    @property
    def functions(self) -> set[str]:
        """The names of all functions that neurons of any layer use."""
        groups = [self.groups] if isinstance(self.groups, dict) else self.groups
        return {name for layer in groups for name, count in layer.items() if count}

    def require(self, layers: int, neurons: int) -> None:
        """Raise ValueError unless these options fit a model with `layers` layers of `neurons` neurons each.

        A list must have one mapping for each layer, and numbers of neurons must add up to `neurons`.
        """
        if isinstance(self.groups, list) and len(self.groups) != layers:
            raise ValueError(f"activation.groups has {len(self.groups)} entries, but there are {layers} layers")
        for layer in range(layers):
            if (found := sum(self.of(layer, neurons).values())) != neurons:
                raise ValueError(
                    f"activation.groups of layer {layer} have {found} neurons, but intermediate_size is {neurons}"
                )

    def of(self, layer: int, neurons: int) -> dict[str, int]:
        """Return {function name: number of neurons that use it} for the block with index `layer`.

        neurons: number of neurons of the block's MLP. Shares are rounded so that the numbers add up to it.
        """
        groups = self.groups if isinstance(self.groups, dict) else self.groups[layer]
        if not any(isinstance(count, float) for count in groups.values()):
            return dict(groups)  # type: ignore[arg-type]
        ends = [round(neurons * end) for end in accumulate(groups.values())]
        return {name: end - start for name, start, end in zip(groups, [0, *ends], ends, strict=False)}


class FixedMix(Activation):
    """An activation with a fixed function for each neuron.

    groups: number of neurons by function; neurons of one function are adjacent, and functions in alphabetical order.
    """

    by_token = True

    def __init__(self, groups: dict[str, int]) -> None:
        super().__init__()
        self.groups = {name: groups[name] for name in sorted(groups) if groups[name]}
        self.sizes, self.functions = list(self.groups.values()), [FUNCTIONS[name] for name in self.groups]

    def forward(
        self,
        gate_BTF: Tensor,
        x_BTD: Tensor,
        tokens: Tokens,
        cache: SkipstoneCacheLayer | None = None,
        runs: Runs | None = None,
    ) -> tuple[Tensor, Records]:
        if runs is not None:
            raise ValueError("fixed_mix needs all neurons in their order, not groups of them")
        if len(self.functions) == 1:
            return self.functions[0](gate_BTF), {}
        parts = zip(self.functions, gate_BTF.split(self.sizes, -1), strict=True)
        return torch.cat([function(part) for function, part in parts], dim=-1), {}

    def stream_mix(self) -> Functions:
        return Functions(tuple(self.groups.items()))

    def extra_repr(self) -> str:
        return ", ".join(f"{count} {name}" for name, count in self.groups.items())


FIXED_MIX = "fixed_mix"


def activated(
    activation: Activation, gate: Tensor, x: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None
) -> tuple[Tensor, Records]:
    """Apply an activation and return its values, shaped as `gate`, and its decisions by mechanism name.

    gate: pre-activations, [B, T, F], or [1, N, F] where `tokens` says that the N real tokens of all rows are
    concatenated without padding. x: the MLP's input, in the same form. cache: where the activation keeps state of
    earlier calls; None means nowhere. An activation that depends on other tokens (not `by_token`) is applied in the
    padded form.
    """
    y_BTF: Tensor
    records: Records
    if tokens.unpadding is None or activation.by_token:
        y_BTF, records = activation(gate, x, tokens, cache)
        return y_BTF, records
    y_BTF, records = activation(tokens.pad(gate), tokens.pad(x), tokens, cache)
    return tokens.unpad(y_BTF), records


class GatedMLP(FeedForward):
    """A gated MLP: down(act(gate(x)) * up(x)) (GLU variants, arXiv 2002.05202).

    width: width of the residual stream. neurons: number of hidden values, which are the MLP's neurons. activation:
    applied to the gates. bias: whether all three projections have bias terms. dropout: dropout probability for the
    output; hidden_dropout: dropout probability for the hidden values.
    """

    def __init__(
        self,
        width: int,
        neurons: int,
        activation: Activation,
        bias: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=bias)
        self.up_proj = nn.Linear(width, neurons, bias=bias)
        self.down_proj = OutputLinear(neurons, width, bias=bias)
        self.activation = activation
        self.dropout, self.hidden_dropout = dropout, hidden_dropout

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        x_BTD = autocast(x_BTD)
        y_BTF, records = activated(self.activation, self.gate_proj(x_BTD), x_BTD, tokens, cache)
        y_BTF = dropped(y_BTF * self.up_proj(x_BTD), self.hidden_dropout, self.training)
        return dropped(self.down_proj(y_BTF), self.dropout, self.training), records

    def weights_per_pass(self) -> int:
        return sum(map(weights_multiplied, (self.gate_proj, self.up_proj, self.down_proj)))


class PlainMLP(FeedForward):
    """An MLP without a gate: down(act(up(x))).

    width: width of the residual stream. neurons: number of hidden values, which are the MLP's neurons. activation:
    applied to the hidden values. bias: whether both projections have biases. dropout: dropout probability for the
    output; hidden_dropout: dropout probability for the hidden values.
    """

    def __init__(
        self,
        width: int,
        neurons: int,
        activation: Activation,
        bias: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, neurons, bias=bias)
        self.down_proj = OutputLinear(neurons, width, bias=bias)
        self.activation = activation
        self.dropout, self.hidden_dropout = dropout, hidden_dropout

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        y_BTF, records = activated(self.activation, self.up_proj(x_BTD), x_BTD, tokens, cache)
        y_BTF = dropped(y_BTF, self.hidden_dropout, self.training)
        return dropped(self.down_proj(y_BTF), self.dropout, self.training), records

    def weights_per_pass(self) -> int:
        return weights_multiplied(self.up_proj) + weights_multiplied(self.down_proj)


MLPS: dict[str, type[GatedMLP] | type[PlainMLP]] = {"gated": GatedMLP, "plain": PlainMLP}


def plain_mlps(model: nn.Module) -> list[str]:
    """Return the paths of the MLPs in a model that compute every neuron by one and the same activation function."""
    return [
        name
        for name, module in model.named_modules()
        if type(module) in (GatedMLP, PlainMLP) and type(module.activation) is FixedActivation
    ]
