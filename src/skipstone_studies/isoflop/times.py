"""The same seconds of training instead of the same FLOPs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from skipstone_studies.isoflop.curves import Curve, make_curve
from skipstone_studies.isoflop.points import Collected, Point


@dataclass(frozen=True, kw_only=True)
class EqualTime:
    """Losses after the same seconds of training. stretched: sizes whose loss lies beyond the budgets that were run."""

    seconds: float
    curves: dict[str, Curve]
    stretched: dict[str, tuple[float, ...]]


STRETCH = 0.3  # of the distance between the outermost budgets, in logarithms: how far beyond them a loss is guessed


def seconds_of(collected: Collected, point: Point) -> float:
    """Of training: its tokens at the speed that was timed in turns, else as the run took."""
    speed = collected.speeds.get((point.cell.arm, str(point.cell.size)))
    tokens = point.records[0].figures["training"]["tokens"]
    return point.seconds if speed is None else tokens / speed


def equal_times(collected: Collected) -> list[EqualTime]:
    """Half way between budgets, by the median time that the base's sizes take for a budget.

    There most losses lie between two that were measured: the loss of a size at a time is read off a straight line
    between its budgets, over the logarithm of the seconds. Not at the largest budget: the sizes that are done sooner
    would have to be guessed, and come out better than anything that was run. Needs two budgets.
    """
    of_budgets = [collected.curves.get((collected.grid.spec.base, budget), []) for budget in collected.grid.budgets]
    medians = [statistics.median(seconds_of(collected, p) for p in points) for points in of_budgets if points]
    return [_at(collected, math.sqrt(first * second)) for first, second in pairwise(medians)]


def _at(collected: Collected, seconds: float) -> EqualTime:
    curves: dict[str, Curve] = {}
    stretched: dict[str, tuple[float, ...]] = {}
    for arm in collected.grid.spec.arms:
        points: list[tuple[Point, float, bool]] = []
        for size in map(str, collected.grid.sizes):
            of_size = [
                p for (name, _), ps in collected.curves.items() if name == arm for p in ps if str(p.cell.size) == size
            ]
            read = _read_off([(seconds_of(collected, p), p.loss) for p in of_size], seconds)
            if read is not None:
                points.append((of_size[0], *read))
        if points:
            curves[arm] = make_curve(
                arm,
                [p.parameters for p, _, _ in points],
                [p.forward_flops for p, _, _ in points],
                [loss for _, loss, _ in points],
                [1] * len(points),
            )
            stretched[arm] = tuple(float(p.parameters) for p, _, beyond in points if beyond)
    return EqualTime(seconds=seconds, curves=curves, stretched=stretched)


def _read_off(pairs: Sequence[tuple[float, float]], seconds: float) -> tuple[float, bool] | None:
    """(loss at `seconds`, whether that is beyond the pairs); None with fewer than two pairs, or too far beyond."""
    if len(pairs) < 2:
        return None
    pairs = sorted(pairs)
    times, x = [math.log(t) for t, _ in pairs], math.log(seconds)
    room = STRETCH * (times[-1] - times[0])
    if not times[0] - room <= x <= times[-1] + room:
        return None
    i = min(max(int(np.searchsorted(times, x)), 1), len(pairs) - 1)
    (_, y0), (_, y1) = pairs[i - 1], pairs[i]
    return y0 + (y1 - y0) * (x - times[i - 1]) / (times[i] - times[i - 1]), not times[0] <= x <= times[-1]
