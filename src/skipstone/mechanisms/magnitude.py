"""Neuron groups by magnitude: each token keeps the neurons with the largest activations. Nothing is learned.

    a      = act(W_gate x)
    tried  = the floor(capacity G) groups with the largest mean |a| r
    h      = a[tried] * W_up[tried] x
    kept   = of these, the floor(down_capacity G) groups with the largest mean |h|
    y      = W_down[kept] h[kept]

r is the typical magnitude of W_up x for each neuron: 1, or its root mean square over some text (`adapt/start.py`), so
that |a| r estimates |h| before it is computed. The gate matrix is multiplied in full.

After CATS (Lee et al. 2024, arXiv 2404.08763), which keeps neurons whose |a| exceeds a threshold of the layer. Ours
are: a fixed number for every token, so that FLOPs are known in advance; r; and the second choice by the product itself,
as TEAL (arXiv 2408.14690) chooses the inputs of a matrix. It saves time in calls of one token.

Shape letters: B rows, T tokens, D width, F neurons, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor
from transformers import initialization as init

from skipstone.core.records import NeuronGroupsRecord
from skipstone.core.routing_module import Placement
from skipstone.core.strict import parsed
from skipstone.core.tokens import Tokens
from skipstone.core.width import ActivationGroupRouter, Share
from skipstone.mechanisms.grouping import GroupingConfig, ScheduledGroups, group_record, share_of_one_token
from skipstone.mechanisms.schedules import Capacity
from skipstone.ops.magnitude import largest, sizes


@dataclass(frozen=True, kw_only=True)
class MagnitudeGroupsConfig(GroupingConfig):
    """Options of neuron groups chosen by magnitude, in addition to those of `GroupingConfig`.

    down_capacity: share of the groups that the last matrix is multiplied for; None: `capacity`. decision: distinguishes
    these options from those of other neuron groups.
    """

    decision: Literal["magnitude"] = "magnitude"
    down_capacity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.down_capacity is not None and not 0 < self.down_capacity <= self.capacity:
            raise ValueError(f"down_capacity must be in (0, capacity = {self.capacity}], got {self.down_capacity}")

    @property
    def down(self) -> float:
        """The capacity of the last matrix: `down_capacity`, or `capacity` if that is None."""
        return self.capacity if self.down_capacity is None else self.down_capacity

    def capacities(self) -> dict[str, float]:
        return {"capacity": self.capacity, "down_capacity": self.down}


class MagnitudeGroups(ScheduledGroups, ActivationGroupRouter):
    """Choose for each token which groups are tried and which of these are kept; `nn/magnitude_mlp.py` executes it."""

    Config: ClassVar[type[MagnitudeGroupsConfig]] = MagnitudeGroupsConfig

    def __init__(
        self,
        hidden_size: int,
        neurons: int,
        placement: Placement | None = None,
        config: MagnitudeGroupsConfig | None = None,
        **options: object,
    ) -> None:
        """Build the router. neurons: of the MLP before pruning. `options` are parsed unless `config` is given."""
        read = parsed(MagnitudeGroupsConfig, config, options)
        super().__init__(read, neurons, placement)
        self.config = read
        self.down_schedule = Capacity(read.down, read.capacity_warmup)
        self.register_buffer("typical_F", torch.empty(self.total * read.group_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the typical magnitude of every neuron to 1."""
        init.ones_(self.typical_F)

    @property
    def group_size(self) -> int:
        return self.config.group_size

    @property
    def kept(self) -> int:
        """The number of groups for which the last matrix is multiplied at present."""
        return self.in_force(self.down_schedule)

    @property
    def tried(self) -> int:
        """The number of groups for which the second matrix is multiplied at present."""
        return self.in_force(self.schedule)

    @property
    def share_on(self) -> Fraction:
        """The mean of both shares once any warm-up is over."""
        tried, kept = (self.config.kept(self.neurons, s.final) for s in (self.schedule, self.down_schedule))
        return Fraction(tried + kept, 2 * self.total)

    def in_words(self) -> str:
        if self.config.down_capacity is None:
            return super().in_words()
        tried = self.counted_in_words(self.config.capacity)
        return f"{tried} tried, {self.config.kept(self.neurons, self.config.down_capacity)} kept"

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the multiplied share of the three matrices, which is 1 but in calls of one token."""
        return share_of_one_token(share, single_token)

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores, fp32 [B, T, G], and which groups are tried, bool; a_BTF: activations of all neurons."""
        score_BTG = sizes(a_BTF, self.config.group_size, self.typical_F)
        return score_BTG, largest(score_BTG, self.tried)

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """Return which groups are kept, bool [B, T, G]; h_BTF: products of the tried groups, 0 for the others."""
        return largest(sizes(h_BTF, self.config.group_size), self.kept)

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        return group_record(score_BTG, tried_BTG, kept_BTG, tokens)

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        super().advance(progress, statistics)
        self.down_schedule.advance(progress)

    def set_identity(self) -> None:
        super().set_identity()
        self.down_schedule.pin(1.0)

    def flops(self, tokens: float, routing: str) -> float:
        """Return 0: sums of magnitudes are not matrix products."""
        return 0
