"""Feed-forward parts. The activation is a slot: `(gate, x, tokens, store) -> (y, records)`.

Shape letters: B rows, T tokens, D width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import Records
from skipstone.core.tokens import Tokens
from skipstone.nn.linear import OutputLinear


def _gelu_tanh(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": _gelu_tanh,
    "relu": F.relu,
    "tanh": torch.tanh,
}


class FixedActivation(nn.Module):
    """One function for every neuron."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name, self.function = name, FUNCTIONS[name]

    def forward(
        self, gate_BTF: Tensor, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Records]:
        return self.function(gate_BTF), {}

    def extra_repr(self) -> str:
        return self.name


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x)) (GLU variants, arXiv 2002.05202)."""

    def __init__(
        self,
        width: int,
        neurons: int,
        activation: nn.Module,
        bias: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=bias)
        self.up_proj = nn.Linear(width, neurons, bias=bias)
        self.down_proj = OutputLinear(neurons, width, bias=bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.hidden_dropout = nn.Dropout(hidden_dropout) if hidden_dropout else nn.Identity()

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        y_BTF, records = self.activation(self.gate_proj(x_BTD), x_BTD, tokens, cache)
        return self.dropout(self.down_proj(self.hidden_dropout(y_BTF * self.up_proj(x_BTD)))), records


class PlainMLP(nn.Module):
    """down(act(up(x)))."""

    def __init__(
        self,
        width: int,
        neurons: int,
        activation: nn.Module,
        bias: bool = False,
        dropout: float = 0.0,
        hidden_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.up_proj = nn.Linear(width, neurons, bias=bias)
        self.down_proj = OutputLinear(neurons, width, bias=bias)
        self.activation = activation
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()
        self.hidden_dropout = nn.Dropout(hidden_dropout) if hidden_dropout else nn.Identity()

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        y_BTF, records = self.activation(self.up_proj(x_BTD), x_BTD, tokens, cache)
        return self.dropout(self.down_proj(self.hidden_dropout(y_BTF))), records


MLPS: dict[str, type[GatedMLP] | type[PlainMLP]] = {"gated": GatedMLP, "plain": PlainMLP}
