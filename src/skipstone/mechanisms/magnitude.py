"""Neurons by magnitude: each token keeps those that its own activations call for. Nothing is learned.

    a      = act(W_gate x)
    tried  = the floor(capacity G) groups with the largest mean |a| r
    h      = a[tried] * W_up[tried] x
    kept   = of these, the floor(down_capacity G) groups with the largest mean |h|
    y      = W_down[kept] h[kept]

r is the typical size of W_up x, neuron by neuron: 1, or its root mean square over some text (`adapt/start.py`), so that
|a| r stands for the |h| that is not known yet. The gate's matrix, which tells, is multiplied in full.

After CATS (Lee et al. 2024, arXiv 2404.08763), which keeps what lies above a threshold of |a| for each layer. Ours: a
fixed number for every token, so that FLOPs are known before; r; and the second choice, by the product itself, as TEAL
(arXiv 2408.14690) chooses the inputs of a matrix. It saves in calls of one token.

Shape letters: B rows, T tokens, D width, F neurons, G groups.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from transformers import initialization as init

from skipstone.core.records import NeuronGroupsRecord
from skipstone.core.tokens import Tokens, real_mask
from skipstone.mechanisms.neuron_groups import NeuronGroups
from skipstone.mechanisms.schedules import Capacity
from skipstone.ops.magnitude import MagnitudeWeights, largest, sizes


class MagnitudeGroups(NeuronGroups):
    """Decides which groups are tried, and which of these are kept; the MLP executes it."""

    typical_F: Tensor

    def _build(self, hidden_size: int) -> None:
        config = self.config
        down = config.capacity if config.down_capacity is None else config.down_capacity
        self.down_schedule = Capacity(down, config.capacity_warmup)
        self.register_buffer("typical_F", torch.empty(self.total * config.group_size))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        init.ones_(self.typical_F)

    @property
    def kept(self) -> int:
        """Groups that go through the last matrix, in force."""
        return self._in_force(self.down_schedule)

    @property
    def tried(self) -> int:
        """Groups that the second matrix is multiplied for, in force."""
        return self._in_force(self.schedule)

    @property
    def share_on(self) -> Fraction:
        """The mean of both shares once a warm-up is over."""
        tried, kept = (self.config.kept(self.neurons, s.final) for s in (self.schedule, self.down_schedule))
        return Fraction(tried + kept, 2 * self.total)

    def multiplied(self, share: Any, single_token: bool) -> Any:
        return (1 + 2 * share) / 3 if single_token else 1 + 0 * share  # the gate in full, up and down in part

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, fp32 [B, T, G], and which groups are tried, bool; a_BTF: activations of all neurons."""
        score_BTG = sizes(a_BTF, self.config.group_size, self.typical_F)
        return score_BTG, largest(score_BTG, self.tried)

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """bool [B, T, G]; h_BTF: products of those that are tried, else 0."""
        return largest(sizes(h_BTF, self.config.group_size), self.kept)

    def parts(self, up_FD: Tensor, down_FD: Tensor) -> MagnitudeWeights:
        """What `ops.magnitude.one_token` needs to know, besides the token."""
        return MagnitudeWeights(self.typical_F, up_FD, down_FD, self.tried, self.kept, self.config.group_size)

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        reached_BT = real_mask(tokens, score_BTG[..., 0])
        if tokens.real_BT is not None:
            tried_BTG, kept_BTG = (on_BTG & reached_BT[..., None] for on_BTG in (tried_BTG, kept_BTG))
            score_BTG = score_BTG.masked_fill(~reached_BT[..., None], float("nan"))
        return NeuronGroupsRecord(score_BTG, kept_BTG, reached_BT, tried_BTG)

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        super().advance(progress, statistics)
        self.down_schedule.advance(progress)

    def set_identity(self) -> None:
        super().set_identity()
        self.down_schedule.pin(1.0)
