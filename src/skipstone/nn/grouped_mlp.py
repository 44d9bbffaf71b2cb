"""A gated MLP of which only some groups of neurons are on; the others are not multiplied.

Two executors, one meaning: the masked one multiplies all neurons and takes those that are off by 0, the gathered one
computes runs of tokens with equal groups by their part of the weights. A decoding step keeps that part in the cache.

Shape letters: B rows, T tokens, N tokens as they come (unpadded or not), D width, F neurons, J neurons that are on, K
groups that are on, S neurons of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import Records
from skipstone.core.tokens import Tokens
from skipstone.nn.linear import OutputLinear
from skipstone.nn.mlp import GatedMLP, activated
from skipstone.ops.neurons import Runs, kept_linear, kept_part
from skipstone.ops.reference import dropped


@dataclass(frozen=True)
class Held:
    """What decoding reads while the decision lasts. group_BK: of each row; parts: its weights gate, up, down."""

    group_BK: Tensor
    parts: list[tuple[Tensor, ...]]


class GroupedMLP(GatedMLP):
    """`router(x, tokens, cache)` chooses groups of neurons, as `mechanisms/neuron_groups.py` does."""

    def __init__(
        self, width: int, neurons: int, activation: nn.Module, router: nn.Module, dropout: float = 0.0
    ) -> None:
        super().__init__(width, neurons, activation, dropout=dropout)
        self.router: Any = router

    @property
    def total(self) -> int:
        """Groups of neurons."""
        return self.router.total  # type: ignore[no-any-return]

    @property
    def divisible(self) -> bool:
        """Whether parts of its matrices may be taken: what an adapter has put beside them (PEFT) would be left out."""
        return all(type(linear) in (nn.Linear, OutputLinear) for linear in self._matrices())

    def multiplied(self, share: Any, single_token: bool) -> Any:
        """Of its matrices, for a share of groups that is on; single_token: in a call of one token."""
        return self.router.multiplied(share, single_token) if self.divisible else 1 + 0 * share

    def _matrices(self) -> tuple[nn.Linear, ...]:
        return self.gate_proj, self.up_proj, self.down_proj

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        choice: Any = self.router(tokens.pad(x_BTD), tokens, cache)
        everything = choice.group_BTK.shape[-1] == self.total or not self.divisible
        if everything or tokens.mode.executor == "masked" or torch.compiler.is_compiling():
            y_BTD, records = self._masked(x_BTD, choice, tokens, cache)
        elif cache is not None and x_BTD.shape[1] == 1 and tokens.unpadding is None and not torch.is_grad_enabled():
            y_BTD, records = self._decoded(x_BTD, choice, tokens, cache)
        else:
            y_BTD, records = self._gathered(x_BTD, choice, tokens, cache)
        return dropped(y_BTD, self.dropout, self.training), {**records, self.router.placement.name: choice.record}

    def _masked(
        self, x_BTD: Tensor, choice: Any, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Records]:
        gate_BTF = self.gate_proj(x_BTD)
        y_BTF, records = activated(self.activation, gate_BTF, x_BTD, tokens, cache)
        y_BTF = y_BTF * self.up_proj(x_BTD)
        gain_BTG = torch.zeros_like(choice.record.score_BTG).scatter(-1, choice.group_BTK, choice.gain_BTK)
        return self.down_proj(_by_group(y_BTF, tokens.unpad(gain_BTG))), records

    def _gathered(
        self, x_BTD: Tensor, choice: Any, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Records]:
        group_BTK = choice.group_BTK
        begins_BT = torch.ones(group_BTK.shape[:2], dtype=torch.bool, device=group_BTK.device)
        begins_BT[:, 1:] = (group_BTK[:, 1:] != group_BTK[:, :-1]).any(-1)
        begins_N, size = tokens.unpad(begins_BT).flatten(), self.gate_proj.out_features // self.total
        runs = Runs.of(tokens.unpad(group_BTK).flatten(0, 1), begins_N, self.total, size)
        x_ND, shape = x_BTD.flatten(0, 1), (*x_BTD.shape[:2], -1)
        gate_BTJ = kept_linear(x_ND, whole_weight(self.gate_proj), runs, 0).view(shape)
        up_BTJ = kept_linear(x_ND, whole_weight(self.up_proj), runs, 0).view(shape)
        y_BTJ, records = self.activation(gate_BTJ, tokens.pad(x_BTD), tokens, cache, runs)
        y_BTJ = _by_group(y_BTJ * up_BTJ, tokens.unpad(choice.gain_BTK))
        return kept_linear(y_BTJ.flatten(0, 1), whole_weight(self.down_proj), runs, 1).view(x_BTD.shape), records

    def _decoded(
        self, x_B1D: Tensor, choice: Any, tokens: Tokens, cache: SkipstoneCacheLayer
    ) -> tuple[Tensor, Records]:
        held = self._held(choice.group_BTK[:, 0], cache)
        runs = Runs(group_MK=held.group_BK, bounds=list(range(len(x_B1D) + 1)), blocks=[], total=self.total)
        gate_B1J, up_B1J = _by_row(x_B1D, held, 0), _by_row(x_B1D, held, 1)
        y_B1J, records = self.activation(gate_B1J, x_B1D, tokens, cache, runs)
        return _by_row(_by_group(y_B1J * up_B1J, choice.gain_BTK), held, 2), records

    def _held(self, group_BK: Tensor, cache: SkipstoneCacheLayer) -> Held:
        """Gathered anew for rows whose groups are others than in the step before. The host waits."""
        held, rows = cache.scratch.get(self.router.placement.name), list(range(len(group_BK)))
        parts: list[Any] = [None for _ in rows]
        if held is not None and held.group_BK.shape == group_BK.shape:
            if torch.equal(held.group_BK, group_BK):
                return held  # type: ignore[no-any-return]
            rows, parts = (held.group_BK != group_BK).any(-1).nonzero()[:, 0].tolist(), list(held.parts)
        for row in rows:
            parts[row] = self._part(group_BK[row])
        held = cache.scratch[self.router.placement.name] = Held(group_BK, parts)
        return held

    def _part(self, group_K: Tensor) -> tuple[Tensor, ...]:
        linears = ((self.gate_proj, 0), (self.up_proj, 0), (self.down_proj, 1))
        return tuple(kept_part(whole_weight(linear), group_K, self.total, axis) for linear, axis in linears)


def whole_weight(linear: nn.Linear) -> Tensor:
    """The weight; of a quantised one (torchao's), which cannot be taken in parts, the numbers that it stands for."""
    weight: Any = linear.weight
    return weight.dequantize() if is_quantised(linear) else weight  # type: ignore[no-any-return]


def is_quantised(linear: nn.Linear) -> bool:
    """Whether its weight stands for other numbers than it holds (torchao)."""
    return type(linear.weight).dequantize is not Tensor.dequantize


def _by_group(y: Tensor, gain: Tensor) -> Tensor:
    """y [.., K S] times gain [.., K], each for S neurons."""
    return (y.unflatten(-1, (gain.shape[-1], -1)) * gain[..., None].to(y.dtype)).flatten(-2)


def _by_row(x_B1I: Tensor, held: Held, which: int) -> Tensor:
    """[B, 1, O], each row by its own weights."""
    if len(x_B1I) == 1:
        return F.linear(x_B1I, held.parts[0][which])
    return torch.stack([F.linear(x, parts[which]) for x, parts in zip(x_B1I, held.parts, strict=True)])
