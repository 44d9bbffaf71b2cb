"""Timing of several calls in turns, so that noise of the machine affects all of them equally."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from skipstone.measure.speed import Lap, Task, take_turns

K = TypeVar("K")


def timed(run: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> Task:
    """Return a function without arguments that calls `run` and returns a `Lap` with the `seconds` of the call.

    clock: returns seconds; `time.process_time` measures CPU time, which other processes disturb less.
    """

    def lap() -> Lap:
        start = clock()
        run()
        return Lap(tokens=1, seconds=clock() - start, joules=None)

    return lap


def seconds(tasks: Mapping[K, Task], rounds: int) -> dict[K, list[float]]:
    """Time all tasks in turns, and return for each, by name, its seconds in every round.

    tasks: by name, functions without arguments that run one call and return a `Lap`, which has its `seconds`. rounds:
    number of rounds after one to warm up.
    """
    return {name: [lap.seconds for lap in rate.laps] for name, rate in take_turns(tasks, rounds).items()}


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    """Return {"median", "min", "max"} of ours / theirs.

    ours, theirs: values of the same rounds, in order; each quotient is taken within a round.
    """
    return spread([a / b for a, b in zip(ours, theirs, strict=True)])


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return {"median", "min", "max"} of the values."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def time_ratio(ours: Callable[[], object], theirs: Callable[[], object], rounds: int) -> dict[str, float]:
    """Time two functions in turns, and return ours / theirs as {"median", "min", "max"} over rounds.

    The ratio is of wall seconds within a round. ours, theirs: the functions, called without arguments. Less than 1
    means that ours is faster. rounds: number of rounds after one to warm up.
    """
    found = seconds({"ours": timed(ours), "theirs": timed(theirs)}, rounds)
    return ratio(found["ours"], found["theirs"])
