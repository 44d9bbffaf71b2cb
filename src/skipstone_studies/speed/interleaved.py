"""Time several calls interleaved, so that machine noise affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from skipstone.measure.speed import Lap, Task, take_turns

K = TypeVar("K")


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Task:
    """Return `run` as a timed task.

    clock: `time.process_time` measures CPU time, which other processes disturb less.
    """

    def lap() -> Lap:
        start = clock()
        run()
        return Lap(tokens=1, seconds=clock() - start, joules=None)

    return lap


def seconds(tasks: Mapping[K, Task], rounds: int) -> dict[K, list[float]]:
    """Return the seconds of each task in each round, after a warm-up round that is discarded."""
    return {name: [lap.seconds for lap in rate.laps] for name, rate in take_turns(tasks, rounds).items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest of our figures relative to theirs, round by round."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, least and greatest, as `Column.spread` shows them."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time both interleaved and return our seconds relative to theirs; less than 1 is faster."""
    found = seconds({"ours": timed(ours), "theirs": timed(theirs)}, rounds)
    return ratio(found["ours"], found["theirs"])
