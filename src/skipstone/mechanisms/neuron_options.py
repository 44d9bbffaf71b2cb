"""Options of neuron groups. What they mean is told in `neuron_groups.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skipstone.mechanisms.schedules import require_capacity
from skipstone.ops.reference import quota


@dataclass(frozen=True, kw_only=True)
class NeuronGroupsConfig:
    """group_size: neurons of a group. capacity: share of the groups that is on. capacity_warmup: share of the training
    over which it falls from 1. chunk_size: tokens of a document that share a decision. decay: a token weighs that much
    of the next one. router_width: R. balance_rate: u, 0 for none. decision: learned, magnitude, or random as a control;
    with magnitude every token has groups of its own, and chunk_size, decay and router_width are not read.
    down_capacity: with magnitude, the share of the groups that the last matrix is multiplied for; None: `capacity`.
    left: groups that each layer still has after pruning; None: all.
    """

    group_size: int = 64
    capacity: float = 0.6
    capacity_warmup: float = 0.0
    chunk_size: int = 64
    decay: float = 0.95
    router_width: int = 32
    balance_rate: float = 0.0
    decision: Literal["learned", "magnitude", "random"] = "learned"
    down_capacity: float | None = None
    left: list[int] | None = None

    def __post_init__(self) -> None:
        for name in ("group_size", "chunk_size", "router_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        require_capacity("capacity", self.capacity)
        if not 0 <= self.capacity_warmup < 1:
            raise ValueError(f"capacity_warmup must be in [0, 1), got {self.capacity_warmup}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")
        if not self.balance_rate >= 0:
            raise ValueError(f"balance_rate must not be negative, got {self.balance_rate}")
        if self.balance_rate and self.decision == "magnitude":
            raise ValueError(f"balance_rate must be 0 with decision 'magnitude', got {self.balance_rate}")
        if self.down_capacity is None:
            return
        if self.decision != "magnitude":
            raise ValueError(f"down_capacity is for decision 'magnitude' alone, got it with {self.decision!r}")
        if not 0 < self.down_capacity <= self.capacity:
            raise ValueError(f"down_capacity must be in (0, capacity = {self.capacity}], got {self.down_capacity}")

    def require(self, layers: int, neurons: int) -> None:
        """Raise ValueError unless so many neurons can be grouped in so many layers, and one group at least is kept."""
        if neurons % self.group_size:
            raise ValueError(
                f"neuron_groups.group_size must divide intermediate_size, got {self.group_size} and {neurons}"
            )
        groups, kept = neurons // self.group_size, self.kept(neurons)
        for name, share in (("capacity", self.capacity), ("down_capacity", self.down_capacity)):
            if share is not None and not self.kept(neurons, share):
                raise ValueError(f"neuron_groups.{name} {share} keeps none of {groups} groups")
        if self.left is None:
            return
        if len(self.left) != layers:
            raise ValueError(f"neuron_groups.left has {len(self.left)} entries, but there are {layers} layers")
        for count in self.left:
            if not kept <= count <= groups:
                raise ValueError(f"neuron_groups.left must be {kept} to {groups} groups, got {count}")

    def kept(self, neurons: int, capacity: float | None = None) -> int:
        """K of an MLP that had so many neurons before pruning."""
        return quota(self.capacity if capacity is None else capacity, neurons // self.group_size)

    def neurons(self, layer: int, neurons: int) -> int:
        """Those that the layer's weights still have."""
        return neurons if self.left is None else self.left[layer] * self.group_size
