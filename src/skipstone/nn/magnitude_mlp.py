"""A gated MLP whose neurons are left out by the size of their own activation, token by token.

The gate's matrix is multiplied in full; what it gives says which neurons are worth the other two matrices. A call of
one token, as in decoding one row, reads and multiplies only their part (the gathered executor). More tokens, each with
neurons of its own, have no smaller product, and parts for each of them would be more to read than the whole: all are
multiplied and those that are off taken by 0, which is the specification, too.

Shape letters: B rows, T tokens, D width, F neurons, J neurons that are on, G groups, K groups that are on.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import Records
from skipstone.core.tokens import Tokens
from skipstone.nn.grouped_mlp import GroupedMLP, whole_weight
from skipstone.nn.mlp import activated, autocast
from skipstone.ops.neurons import kept_part
from skipstone.ops.reference import dropped


class MagnitudeMLP(GroupedMLP):
    """`router.by_magnitude(activation, tokens)` chooses groups of neurons, as `mechanisms/neuron_groups.py` does."""

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        x_BTD = autocast(x_BTD)
        y_BTF, records = activated(self.activation, self.gate_proj(x_BTD), x_BTD, tokens, cache)
        choice: Any = self.router.by_magnitude(tokens.unpack(y_BTF), tokens)
        kept = choice.group_BTK.shape[-1]
        gathers = tokens.mode.lone and tokens.mode.executor == "gathered" and not torch.compiler.is_compiling()
        if kept < self.total and gathers:
            delta_BTD = self._in_part(x_BTD[0], y_BTF[0], choice.group_BTK[0, 0])[None]
        else:
            y_BTF = y_BTF * self.up_proj(x_BTD)
            delta_BTD = self.down_proj(y_BTF if kept == self.total else self._without(y_BTF, choice.group_BTK, tokens))
        return dropped(delta_BTD, self.dropout, self.training), {**records, self.router.place.name: choice.record}

    def _without(self, y: Tensor, group_BTK: Tensor, tokens: Tokens) -> Tensor:
        on_BTG = torch.zeros(*group_BTK.shape[:2], self.total, dtype=torch.bool, device=y.device)
        on = tokens.pack(on_BTG.scatter(-1, group_BTK, True))
        return y.unflatten(-1, (self.total, -1)).mul(on[..., None]).flatten(-2)

    def _in_part(self, x_1D: Tensor, y_1F: Tensor, group_K: Tensor) -> Tensor:
        """[1, D]."""
        group_K = group_K.sort().values  # parts of columns are copied four times as fast in their order
        up_JD = kept_part(whole_weight(self.up_proj), group_K, self.total, 0)
        down_DJ = kept_part(whole_weight(self.down_proj), group_K, self.total, 1)
        y_1J = kept_part(y_1F, group_K, self.total, 1)
        return F.linear(y_1J * F.linear(x_1D, up_JD), down_DJ)


def mlp_of(decision: str) -> type[GroupedMLP]:
    """The MLP that executes what `neuron_groups.decision` names."""
    return MagnitudeMLP if decision == "magnitude" else GroupedMLP
