"""Schedules over a training: their progress, and the capacity at present.

A trainer advances schedules between optimizer steps, not in forward, which activation checkpointing repeats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.mechanisms.base import Placement

Shape = Literal["linear", "cosine"]
UNIT = 1_000_000  # progress is stored as an integer, which casting a model does not change


def between(start: float, end: float, share: float, shape: Shape) -> float:
    """Interpolate from `start` at share 0 to `end` at share 1 and beyond, linearly or as half a cosine."""
    share = min(max(share, 0.0), 1.0)
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return (1 - share) * start + share * end


def require_capacity(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in (0, 1]."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A capacity that changes over depth, from `start` in the first routed block to `end` in the last."""

    start: float
    end: float
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        require_capacity("start", self.start)
        require_capacity("end", self.end)


def require_capacities(name: str, capacity: float | list[float] | Ramp) -> None:
    """Raise ValueError unless `capacity` is a number in (0, 1], a list of at least one, or a ramp."""
    if capacity == []:
        raise ValueError(f"{name} lists no number; give one for each routed block")
    for number in [] if isinstance(capacity, Ramp) else capacity if isinstance(capacity, list) else [capacity]:
        require_capacity(name, number)


def capacity_at(capacity: float | list[float] | Ramp, placement: Placement) -> float:
    """Return the capacity of one block, which options may give as a number, a list or a ramp over depth.

    Raises ValueError for a list whose length is not the number of routed blocks.
    """
    if isinstance(capacity, Ramp):
        return between(capacity.start, capacity.end, placement.index / max(placement.count - 1, 1), capacity.shape)
    if not isinstance(capacity, list):
        return capacity
    if len(capacity) != placement.count:
        raise ValueError(
            f"capacity lists {len(capacity)} numbers, but {placement.count} blocks are routed; give one for each"
        )
    return capacity[placement.index]


class Progress(nn.Module):
    """The progress of a schedule that ends at `until` of the training: a buffer for checkpoints, Python values for the
    host.

    The Python values stop changing at the end of the schedule, because a compiler treats them as constants and would
    recompile at every change.
    """

    millionths: Tensor

    def __init__(self, until: float) -> None:
        super().__init__()
        self.until = until
        self.register_buffer("millionths", torch.zeros((), dtype=torch.long))
        self._known: int | None = None  # None: to be read from the buffer, which makes the host wait once
        self.over = False  # known to be over; if it is over but not known to be, results are the same

    def reset_parameters(self) -> None:
        """Initialise the buffer for checkpoints without it, for which transformers allocates empty memory."""
        init.zeros_(self.millionths)
        self._forget()

    @property
    def share(self) -> float:
        """The progress of the schedule: 0 before the first step, 1 from its end on."""
        if self._known is None:
            self._know(int(self.millionths.item()))
        assert self._known is not None
        return self._known / UNIT

    def advance(self, progress: float) -> None:
        """Set the progress of the training, 0 to 1, rounded as a checkpoint stores it."""
        self._know(round(min(max(progress / self.until, 0.0), 1.0) * UNIT))
        self.millionths.fill_(self._known)  # type: ignore[arg-type]

    def _know(self, millionths: int) -> None:
        self._known, self.over = millionths, millionths == UNIT

    def _forget(self) -> None:
        self._known, self.over = None, False

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._forget()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Progress:
        self._forget()  # the buffer may have been replaced, or be uninitialised
        return super()._apply(fn, recurse)  # type: ignore[no-any-return]


class Capacity(nn.Module):
    """The share of tokens that a block may keep: `now` falls from 1 to `final` over the first `warmup` of a training.

    A warm-up lets a block learn on every token before it has to choose (Mixture-of-Recursions, arXiv 2507.10524, also
    warms up the share of tokens of its expert-choice router).
    """

    def __init__(self, final: float, warmup: float = 0.0, shape: Shape = "linear") -> None:
        super().__init__()
        self.final, self.shape = final, shape
        self.progress = Progress(warmup) if warmup else None

    @property
    def now(self) -> float:
        """The capacity at present: during a warm-up, between 1 and the final one."""
        if self.progress is None:
            return self.final
        return between(1.0, self.final, self.progress.share, self.shape)

    @property
    def moves(self) -> bool:
        """Whether a warm-up is still running."""
        return self.progress is not None and self.progress.share < 1

    def pin(self, capacity: float) -> None:
        """Set the final capacity; a warm-up, if there is one, now falls towards it."""
        self.final = capacity

    def advance(self, progress: float) -> None:
        """Follow the progress of the training, 0 to 1, if there is a warm-up."""
        if self.progress is not None:
            self.progress.advance(progress)

    def not_ready_reason(self) -> str | None:
        """Return why the capacity is not that of a trained model; None if it is."""
        if self.progress is None or self.progress.share:
            return None
        return (
            "capacity_warmup was never advanced, so that every token is still kept: train with "
            "skipstone.train.RoutingTrainer or its RoutingMixin, or add its RoutingCallback"
        )

    def extra_repr(self) -> str:
        return f"final={self.final}, shape={self.shape}"
