"""Schedules over a training: their progress, and the capacity, the share of tokens that a block keeps at present.

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
    """Return the value between `start`, reached at share 0 and below, and `end`, at share 1 and above.

    share: how far the way from `start` to `end` is. shape: "linear", or "cosine" for half a cosine wave, which begins
    and ends flat.
    """
    share = min(max(share, 0.0), 1.0)
    if shape == "cosine":
        share = (1 - math.cos(math.pi * share)) / 2
    return (1 - share) * start + share * end


def require_capacity(name: str, value: float) -> None:
    """Raise ValueError unless `value` is in (0, 1]. name: the option as the message calls it."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be in (0, 1], got {value}")


@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A capacity that changes over depth, from `start` in the first routed block to `end` in the last, both in (0, 1].

    shape: "linear" or "cosine" (half a cosine wave). Raises ValueError for a capacity out of range.
    """

    start: float
    end: float
    shape: Shape = "linear"

    def __post_init__(self) -> None:
        require_capacity("start", self.start)
        require_capacity("end", self.end)


def require_capacities(name: str, capacity: float | list[float] | Ramp) -> None:
    """Raise ValueError unless `capacity` is a number in (0, 1], a non-empty list of these, or a ramp.

    name: the option as the message calls it.
    """
    if capacity == []:
        raise ValueError(f"{name} lists no number; give one for each routed block")
    for number in [] if isinstance(capacity, Ramp) else capacity if isinstance(capacity, list) else [capacity]:
        require_capacity(name, number)


def capacity_at(capacity: float | list[float] | Ramp, placement: Placement) -> float:
    """Return the capacity, a share in (0, 1], of one block.

    capacity: a number for all routed blocks, a list with one for each, or a ramp over depth. placement: the block's
    position among the routed blocks. Raises ValueError for a list whose length is not the number of routed blocks.
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
    """The progress of a schedule that ends at the share `until` of the training, in (0, 1].

    millionths: the progress in millionths, int64 [], a buffer that checkpoints contain. The property `share` and the
    attribute `over` (True if the schedule is known to have ended) give it to the host as Python values. Once the
    schedule has ended, these do not change any more, so that torch.compile, which treats them as constants, need not
    recompile.
    """

    millionths: Tensor

    def __init__(self, until: float) -> None:
        super().__init__()
        self.until = until
        self.register_buffer("millionths", torch.zeros((), dtype=torch.long))
        self._known: int | None = None  # None: to be read from the buffer, which makes the host wait once
        self.over = False  # known to be over; if it is over but not known to be, results are the same

    def reset_parameters(self) -> None:
        """Set the progress to 0; transformers calls this after loading a checkpoint that lacks it."""
        init.zeros_(self.millionths)
        self._forget()

    @property
    def share(self) -> float:
        """The progress of the schedule: 0 before the first step, 1 from the end of the schedule on."""
        if self._known is None:
            self._know(int(self.millionths.item()))
        assert self._known is not None
        return self._known / UNIT

    def advance(self, progress: float) -> None:
        """Set the progress of the schedule to progress / `until`, at most 1 and rounded to millionths.

        progress: the fraction of training completed, from 0 to 1.
        """
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
    """The share of a document's tokens that a block keeps, which may fall from 1 to `final` during a warm-up.

    final: the share after the warm-up. warmup: the length of the warm-up as a fraction of the training; 0 means no
    warm-up. shape: the shape of the fall, "linear" or "cosine". A warm-up lets a block learn on every token before it
    has to choose; Mixture-of-Recursions (arXiv 2507.10524) has one as well. The current share is `now`.
    """

    def __init__(self, final: float, warmup: float = 0.0, shape: Shape = "linear") -> None:
        super().__init__()
        self.final, self.shape = final, shape
        self.progress = Progress(warmup) if warmup else None

    @property
    def now(self) -> float:
        """The current share of tokens: between 1 and `final` during a warm-up, else `final`."""
        if self.progress is None:
            return self.final
        return between(1.0, self.final, self.progress.share, self.shape)

    @property
    def moves(self) -> bool:
        """Whether a warm-up is still running."""
        return self.progress is not None and self.progress.share < 1

    def pin(self, capacity: float) -> None:
        """Set `final`, the share after the warm-up, to `capacity`; a running warm-up then falls towards it."""
        self.final = capacity

    def advance(self, progress: float) -> None:
        """Move the warm-up on, if there is one, which changes the current share `now`.

        progress: the fraction of training completed, from 0 to 1.
        """
        if self.progress is not None:
            self.progress.advance(progress)

    def not_ready_reason(self) -> str | None:
        """Return a message if there is a warm-up that never began, so that all tokens are still kept; else None."""
        if self.progress is None or self.progress.share:
            return None
        return (
            "capacity_warmup was never advanced, so that every token is still kept: train with "
            "skipstone.train.RoutingTrainer or its RoutingMixin, or add its RoutingCallback"
        )

    def extra_repr(self) -> str:
        return f"final={self.final}, shape={self.shape}"
