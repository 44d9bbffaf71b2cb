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
from skipstone.core.stream_gate import NeuronChoice
from skipstone.core.strict import parsed
from skipstone.core.tokens import Tokens
from skipstone.core.width import ActivationGroupRouter, Share
from skipstone.mechanisms.grouping import GroupingConfig, ScheduledGroups, group_record, share_of_one_token
from skipstone.mechanisms.schedules import Capacity
from skipstone.ops.magnitude import largest, sizes


@dataclass(frozen=True, kw_only=True)
class MagnitudeGroupsConfig(GroupingConfig):
    """The options of neuron groups that are chosen by the magnitude of their activations.

    group_size: neurons per group. capacity: share of the groups for which the up projection is multiplied, in (0, 1].
    down_capacity: share of the groups for which the down projection is multiplied, in (0, capacity]; None means
    `capacity`. capacity_warmup: fraction of the training, in [0, 1), over which both shares fall from 1. left: the
    number of groups left after pruning, one per layer; None means that nothing was pruned. decision: always
    "magnitude"; it distinguishes these options from those of other neuron groups. Raises ValueError for values out of
    range.
    """

    decision: Literal["magnitude"] = "magnitude"
    down_capacity: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.down_capacity is not None and not 0 < self.down_capacity <= self.capacity:
            raise ValueError(f"down_capacity must be in (0, capacity = {self.capacity}], got {self.down_capacity}")

    @property
    def down(self) -> float:
        """The share of groups for which the down projection is multiplied: `down_capacity`, else `capacity`."""
        return self.capacity if self.down_capacity is None else self.down_capacity

    def capacities(self) -> dict[str, float]:
        return {"capacity": self.capacity, "down_capacity": self.down}


class MagnitudeGroups(ScheduledGroups, ActivationGroupRouter):
    """A router that keeps a token's neuron groups with the largest activations; nothing is learned.

    In a gated MLP with a = act(W_gate x), it first chooses the groups with the largest mean |a| * typical_F, for which
    W_up x is multiplied ("tried"), then, among these, the groups with the largest mean |a * W_up x|, for which W_down
    is multiplied ("kept"). Time is saved in calls of one token. typical_F: the root mean square of each neuron of W_up
    x over the text that `skipstone adapt` reads for it; 1 before that. hidden_size: not used. neurons: MLP neurons
    before pruning. placement: the block in which it is used; None outside of a model. config: the options, or pass its
    fields as keyword arguments. Related: CATS (arXiv 2404.08763).
    """

    Config: ClassVar[type[MagnitudeGroupsConfig]] = MagnitudeGroupsConfig

    def __init__(
        self,
        hidden_size: int,
        neurons: int,
        placement: Placement | None = None,
        config: MagnitudeGroupsConfig | None = None,
        **options: object,
    ) -> None:
        """Build the router.

        hidden_size: not used. neurons: number of the MLP's neurons before pruning. placement: the block of the router;
        None means block 0. config: the options; if None, `options`, the fields of `MagnitudeGroupsConfig`, are parsed.
        """
        read = parsed(MagnitudeGroupsConfig, config, options)
        super().__init__(read, neurons, placement)
        self.config = read
        self.down_schedule = Capacity(read.down, read.capacity_warmup)
        self.register_buffer("typical_F", torch.empty(self.total * read.group_size))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set typical_F, the factor on each neuron's |activation| in scores, to 1."""
        init.ones_(self.typical_F)

    @property
    def group_size(self) -> int:
        return self.config.group_size

    @property
    def kept(self) -> int:
        """The number of neuron groups for which the down projection is currently multiplied, for each token."""
        return self.in_force(self.down_schedule)

    @property
    def tried(self) -> int:
        """The number of neuron groups for which the up projection is currently multiplied, for each token."""
        return self.in_force(self.schedule)

    @property
    def share_on(self) -> Fraction:
        """The share of neuron groups that is on once any warm-up is over, of those left after pruning.

        It is the mean of the shares of groups tried (multiplied by the up projection) and kept (by the down
        projection).
        """
        tried, kept = (self.config.kept(self.neurons, s.final) for s in (self.schedule, self.down_schedule))
        return Fraction(tried + kept, 2 * self.total)

    def in_words(self) -> str:
        if self.config.down_capacity is None:
            return super().in_words()
        tried = self.counted_in_words(self.config.capacity)
        return f"{tried} tried, {self.config.kept(self.neurons, self.config.down_capacity)} kept"

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the share of the MLP's weights that is multiplied if `share` of the groups is on: (1 + 2 share) / 3.

        The gate matrix is multiplied in full, the other two only for groups that are on. share: from 0 to 1, as a
        fraction or a tensor with one value per token; the result has the same type. single_token: whether the call has
        one token and no gradient; in all other calls the result is 1.
        """
        return share_of_one_token(share, single_token)

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores of the G neuron groups, fp32 [B, T, G], and which groups are tried, bool [B, T, G].

        a_BTF: activations act(W_gate x) of all F neurons. A score is the mean over a group's neurons of |a| *
        typical_F. The groups with the highest scores are tried, as many as the property `tried` says: only for these is
        the up projection multiplied.
        """
        score_BTG = sizes(a_BTF, self.config.group_size, self.typical_F)
        return score_BTG, largest(score_BTG, self.tried)

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """Return which of a token's G neuron groups are kept, bool [B, T, G].

        These are the groups whose mean of |h| over their neurons is largest, as many as the property `kept` says.
        h_BTF: products of activation and up projection, 0 for groups for which the up projection was not multiplied.
        """
        return largest(sizes(h_BTF, self.config.group_size), self.kept)

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        return group_record(score_BTG, tried_BTG, kept_BTG, tokens)

    def stream_choice(self) -> NeuronChoice:
        return NeuronChoice(
            self.placement.name, "largest", self.typical_F, self.tried, self.kept, self.config.group_size
        )

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        super().advance(progress, statistics)
        self.down_schedule.advance(progress)

    def set_identity(self) -> None:
        super().set_identity()
        self.down_schedule.pin(1.0)

    def flops(self, tokens: float, routing: str) -> float:
        """Return 0 for any `tokens` and `routing`: only matrix products count as FLOPs, and the choice needs none."""
        return 0
