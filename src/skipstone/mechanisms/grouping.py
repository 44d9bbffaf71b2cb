"""Code that all routers of neuron groups share: the numbers of groups that exist and that are on.

Shape letters: B rows, T tokens, D width, G groups, K groups that are on.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.core.records import NeuronGroupsRecord
from skipstone.core.routing_module import Placement
from skipstone.core.tokens import Tokens, real_mask
from skipstone.core.width import GroupRouter, Share
from skipstone.mechanisms.schedules import Capacity, require_capacity
from skipstone.ops import reference as ops
from skipstone.ops.reference import quota

NAME = "neuron_groups"


class NeuronChoiceConfig:
    """The base class of the options of mechanisms that choose which neurons of an MLP are multiplied."""

    def require(self, layers: int, neurons: int) -> None:
        """Raise ValueError if these options do not fit a model of `layers` layers with `neurons` MLP neurons each.

        Subclasses say what has to fit, such as the size of the groups; by default everything does.
        """

    def neurons(self, layer: int, neurons: int) -> int:
        """Return how many of the `neurons` MLP neurons of block `layer` are left after pruning; by default all."""
        return neurons


@dataclass(frozen=True, kw_only=True)
class GroupingConfig(NeuronChoiceConfig):
    """The options shared by the mechanisms that switch groups of adjacent MLP neurons on and off.

    group_size: neurons per group. capacity: share of the groups that is on for a token, in (0, 1]. capacity_warmup:
    fraction of the training, in [0, 1), over which the capacity falls from 1 to its value. left: the number of groups
    left after pruning, one per layer; None means that nothing was pruned. Raises ValueError for values out of range.
    """

    group_size: int = 64
    capacity: float = 0.6
    capacity_warmup: float = 0.0
    left: list[int] | None = None

    def __post_init__(self) -> None:
        if self.group_size < 1:
            raise ValueError(f"group_size must be at least 1, got {self.group_size}")
        require_capacity("capacity", self.capacity)
        if not 0 <= self.capacity_warmup < 1:
            raise ValueError(f"capacity_warmup must be in [0, 1), got {self.capacity_warmup}")

    def capacities(self) -> dict[str, float]:
        """Return all options that are shares of groups to keep, by name, such as {"capacity": 0.6}."""
        return {"capacity": self.capacity}

    def require(self, layers: int, neurons: int) -> None:
        """Raise ValueError if these options do not fit `layers` layers with `neurons` neurons each before pruning.

        The group size must divide `neurons`, every capacity must keep at least one group, and `left` must have one
        valid entry for each layer.
        """
        if neurons % self.group_size:
            raise ValueError(
                f"neuron_groups.group_size must divide intermediate_size, got {self.group_size} and {neurons}"
            )
        groups, kept = neurons // self.group_size, self.kept(neurons)
        for name, share in self.capacities().items():
            if not self.kept(neurons, share):
                raise ValueError(f"neuron_groups.{name} {share} keeps none of {groups} groups")
        if self.left is None:
            return
        if len(self.left) != layers:
            raise ValueError(f"neuron_groups.left has {len(self.left)} entries, but there are {layers} layers")
        for count in self.left:
            if not kept <= count <= groups:
                raise ValueError(f"neuron_groups.left must be {kept} to {groups} groups, got {count}")

    def kept(self, neurons: int, capacity: float | None = None) -> int:
        """Return the number of groups that are on, floor(capacity * number of groups).

        neurons: the MLP's neurons before pruning. capacity: a share in (0, 1]; None means the option `capacity`.
        """
        return quota(self.capacity if capacity is None else capacity, neurons // self.group_size)

    def neurons(self, layer: int, neurons: int) -> int:
        """Return how many MLP neurons block `layer` has after pruning. neurons: their number before pruning."""
        return neurons if self.left is None else self.left[layer] * self.group_size


class ScheduledGroups(GroupRouter):
    """The base class of routers of neuron groups whose capacity (share of groups on) may fall during training.

    config: the options. neurons: the MLP's neurons before pruning. placement: the block of the router; None means block
    0. total: the number of groups left after pruning.
    """

    def __init__(self, config: GroupingConfig, neurons: int, placement: Placement | None) -> None:
        super().__init__()
        self.grouping = config
        self.placement, self.neurons = placement or Placement(name=NAME), neurons
        self.total = config.neurons(self.placement.layer, neurons) // config.group_size
        self.schedule = Capacity(config.capacity, config.capacity_warmup)

    def in_force(self, schedule: Capacity) -> int:
        """Return the number of groups that are currently on for a token.

        schedule: the share of groups to keep, of those before pruning. The result is at most the number left after
        pruning.
        """
        return min(self.grouping.kept(self.neurons, schedule.now), self.total)

    def in_words(self) -> str:
        return f"{self.counted_in_words(self.grouping.capacity)} on"

    def counted_in_words(self, capacity: float) -> str:
        """Return a text such as `12 of 20 neuron groups` for a capacity, a share of the groups before pruning."""
        kinds = "neurons" if self.grouping.group_size == 1 else "neuron groups"
        kept = self.grouping.kept(self.neurons, capacity)
        return f"{kept} of {self.neurons // self.grouping.group_size} {kinds}"

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        self.schedule.advance(progress)

    def empty_record(self, x_BTD: Tensor) -> NeuronGroupsRecord:
        return empty_groups(x_BTD, self.total)

    def not_ready_reason(self) -> str | None:
        return self.schedule.not_ready_reason()

    def start_as_dense(self) -> None:
        """Do nothing when a dense model begins to be adapted: the capacity's warm-up starts with every group on."""

    def set_identity(self) -> None:
        """Keep every group of neurons on from now on, so that the MLP leaves nothing out."""
        self.schedule.pin(1.0)


def empty_groups(x_BTD: Tensor, total: int) -> NeuronGroupsRecord:
    """Return the decisions of an MLP that no token reached in this call: all scores are NaN and no group is on.

    x_BTD: the MLP's input, which gives B, T and the device. total: G, the number of groups of neurons that are switched
    together. Scores and masks are [B, T, G]; scores are fp32, or fp64 if x_BTD is fp64.
    """
    nan_BTG = x_BTD.new_full((*x_BTD.shape[:2], total), float("nan"), dtype=ops.wide_dtype(x_BTD))
    none_BTG = nan_BTG > 0
    return NeuronGroupsRecord(nan_BTG, none_BTG, x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.bool), none_BTG)


def group_record(score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
    """Return a record of which groups of MLP neurons were chosen; at padding, scores become NaN and masks False.

    score_BTG: fp32 scores of G groups. tried_BTG: bool, the groups whose up projection was computed. kept_BTG: bool,
    the groups whose down projection was computed too. tokens: the tokens of this call; `tokens.real_BT` marks padding.
    """
    reached_BT = real_mask(tokens, score_BTG[..., 0])
    if tokens.real_BT is not None:
        tried_BTG, kept_BTG = (on_BTG & reached_BT[..., None] for on_BTG in (tried_BTG, kept_BTG))
        score_BTG = score_BTG.masked_fill(~reached_BT[..., None], float("nan"))
    return NeuronGroupsRecord(score_BTG, kept_BTG, reached_BT, tried_BTG)


def share_of_one_token(share: Share, single_token: bool) -> Share:
    """Return the share of a gated MLP's weights that a call reads if a share of its neurons is on: (1 + 2 share) / 3.

    The gate matrix is read in full, up and down projection only for neurons that are on. share: the share of neurons
    that is on. single_token: whether the call has one token and no gradient; other calls read all three matrices in
    full, 1.
    """
    return (1 + 2 * share) / 3 if single_token else 1 + 0 * share
