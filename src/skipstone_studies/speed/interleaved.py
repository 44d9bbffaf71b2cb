"""Timing several calls interleaved, so that a machine that is busy for a minute is busy for all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from skipstone.measure.speed import Lap, Task, take_turns

K = TypeVar("K")


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Task:
    """`run` as a task. clock: `time.process_time` takes the CPU time of this process, which others disturb less."""

    def lap() -> Lap:
        start = clock()
        run()
        return Lap(tokens=1, seconds=clock() - start, joules=None)

    return lap


def seconds(tasks: Mapping[K, Task], rounds: int) -> dict[K, list[float]]:
    """Seconds of each task in each round; a first round, which warms up, is thrown away."""
    return {name: [lap.seconds for lap in rate.laps] for name, rate in take_turns(tasks, rounds).items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Our figures by theirs, round by round: median, least and greatest."""
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, least and greatest: what `Column.spread` shows."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Our seconds by theirs, interleaved; less than 1 is faster."""
    found = seconds({"ours": timed(ours), "theirs": timed(theirs)}, rounds)
    return ratio(found["ours"], found["theirs"])
