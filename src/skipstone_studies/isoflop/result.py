"""Points -> optima, the FLOPs of a forward pass at the same loss, losses after equal times; all with their spread.

The spread is a parametric bootstrap: every loss gets normal noise of the size that seeds show (pooled over all cells
with more than one; else that of the parabolas' residuals), and everything is fitted again. The size of the noise is
itself known only to its degrees of freedom, so each draw takes another one, from the scaled inverse chi distribution:
of a single difference the interval would be Student's.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal

import numpy as np

from skipstone_studies.intervals import CONFIDENCE, POWERS, detectable_in_errors, t_quantile
from skipstone_studies.isoflop.curves import Curve, GridPoint, GridRecords, curve, make_curve


@dataclass(frozen=True, kw_only=True)
class EqualTime:
    """Losses after the same seconds of training. stretched: sizes whose loss lies beyond the budgets that were run.

    The seeds of its curves are those that a mean of as little noise would have.
    """

    seconds: float
    curves: dict[str, Curve]
    stretched: dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class ReadOff:
    """A loss read off a line. beyond: outside of the points. seeds: of a mean with as little noise."""

    loss: float
    beyond: bool
    seeds: float


STRETCH = 0.3  # of the distance between the outermost budgets, in logarithms: how far beyond them a loss is guessed


def seconds_of(collected: GridRecords, point: GridPoint) -> float:
    """Of training: its tokens at the interleaved timing's speed, else as the run took."""
    speed = collected.speeds.get((point.cell.arm, str(point.cell.size)))
    tokens = point.records[0].figures["training"]["tokens"]
    return point.seconds if speed is None else tokens / speed


def equal_times(collected: GridRecords) -> list[EqualTime]:
    """Half way between budgets, by the median time that the base's sizes take for a budget.

    There most losses lie between two that were measured: the loss of a size at a time is read off a straight line
    between its budgets, over the logarithm of the seconds. Not at the largest budget: the sizes that are done sooner
    would have to be guessed, and come out better than anything that was run. Needs two budgets.
    """
    of_budgets = [collected.curves.get((collected.grid.spec.base, budget), []) for budget in collected.grid.budgets]
    medians = [statistics.median(seconds_of(collected, p) for p in points) for points in of_budgets if points]
    return [_at(collected, math.sqrt(first * second)) for first, second in pairwise(medians)]


def _at(collected: GridRecords, seconds: float) -> EqualTime:
    curves: dict[str, Curve] = {}
    stretched: dict[str, tuple[float, ...]] = {}
    for arm in collected.grid.spec.arms:
        points: list[tuple[GridPoint, ReadOff]] = []
        for size in map(str, collected.grid.sizes):
            of_size = [
                p for (name, _), ps in collected.curves.items() if name == arm for p in ps if str(p.cell.size) == size
            ]
            read = _read_off([(seconds_of(collected, p), p.loss, len(p.losses)) for p in of_size], seconds)
            if read is not None:
                points.append((of_size[0], read))
        if points:
            curves[arm] = make_curve(
                arm,
                [p.parameters for p, _ in points],
                [p.forward_flops for p, _ in points],
                [read.loss for _, read in points],
                [read.seeds for _, read in points],
            )
            stretched[arm] = tuple(float(p.parameters) for p, read in points if read.beyond)
    return EqualTime(seconds=seconds, curves=curves, stretched=stretched)


def _read_off(points: Sequence[tuple[float, float, int]], seconds: float) -> ReadOff | None:
    """points: (seconds, loss, seeds). None with fewer than two of them, or too far beyond."""
    if len(points) < 2:
        return None
    points = sorted(points)
    times, x = [math.log(t) for t, _, _ in points], math.log(seconds)
    room = STRETCH * (times[-1] - times[0])
    if not times[0] - room <= x <= times[-1] + room:
        return None
    i = min(max(int(np.searchsorted(times, x)), 1), len(points) - 1)
    (_, y0, n0), (_, y1, n1) = points[i - 1], points[i]
    part = (x - times[i - 1]) / (times[i] - times[i - 1])
    seeds = 1 / ((1 - part) ** 2 / n0 + part**2 / n1)
    return ReadOff(loss=y0 + (y1 - y0) * part, beyond=not times[0] <= x <= times[-1], seeds=seeds)


DRAWS = 1000


@dataclass(frozen=True, kw_only=True)
class Noise:
    """deviation: of one run's loss, in nats. source: seeds, or the parabolas' residuals. degrees: of freedom."""

    deviation: float
    source: Literal["seeds", "residuals"]
    degrees: int


@dataclass(frozen=True, kw_only=True)
class SameLoss:
    """How an arm compares with the optimum of the base, the arm that others are held against, at the same budget.

    share: FLOPs of its forward pass, at the smallest size that reaches the base's loss, by those of that optimum; None
    where no size does. at_most: its smallest size reaches it already. parameters: of that size; ratio: by those of the
    base's optimum. gap: its own best loss minus the base's. low, high, ratio_low, ratio_high: 90 % intervals of share
    and ratio over the draws that reach the loss, whose part of all draws is `reached`; gap_low, gap_high: of the gap;
    None without noise.
    """

    arm: str
    share: float | None
    at_most: bool
    parameters: float | None
    ratio: float | None
    gap: float
    low: float | None = None
    high: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    reached: float | None = None
    gap_low: float | None = None
    gap_high: float | None = None
    detectable: tuple[float, ...] = ()  # gaps that such noise lets be seen, at each of `intervals.POWERS`

    @property
    def verdict(self) -> str:
        """Of the best losses, by the interval of their gap."""
        if self.gap_low is None or self.gap_high is None:
            return "no interval"
        return "better" if self.gap_high < 0 else "worse" if self.gap_low > 0 else "not told apart"


def noise(collected: GridRecords) -> Noise | None:
    """None where neither seeds nor residuals tell anything."""
    groups = [point.losses for point in collected if len(point.losses) > 1]
    squares = sum(statistics.variance(losses) * (len(losses) - 1) for losses in groups)
    degrees = sum(len(losses) - 1 for losses in groups)
    if degrees:
        return Noise(deviation=math.sqrt(squares / degrees), source="seeds", degrees=degrees)
    residuals = [curve(points).fit.residuals for points in collected.curves.values() if len(points) > 3]
    degrees = sum(len(found) - 3 for found in residuals)
    if not degrees:
        return None
    squares = sum(value * value for found in residuals for value in found)
    return Noise(deviation=math.sqrt(squares / degrees), source="residuals", degrees=degrees)


def same_loss(curves: Mapping[str, Curve], name: str, spread: Noise | None) -> list[SameLoss]:
    """Every arm but the base, at one budget; nothing without a curve of the base."""
    base = curves.get(name)
    if base is None:
        return []
    return [_with_spread(base, other, spread) for arm, other in curves.items() if arm != name]


def _compared(base: Curve, other: Curve) -> SameLoss:
    best, x = base.fit.optimum, other.fit.first_below(base.fit.optimum.loss)
    return SameLoss(
        arm=other.arm,
        share=None if x is None else other.forward(x) / base.forward(best.x),
        at_most=x is not None and x <= other.fit.low,
        parameters=x,
        ratio=None if x is None else x / best.x,
        gap=other.fit.optimum.loss - best.loss,
    )


def _with_spread(base: Curve, other: Curve, spread: Noise | None) -> SameLoss:
    plain = _compared(base, other)
    if spread is None:
        return plain
    generator = np.random.default_rng(0)
    drawn = [
        _compared(_noisy(base, deviation, generator), _noisy(other, deviation, generator))
        for deviation in _deviations(spread, generator)
    ]
    low, high = _interval([each.share for each in drawn])
    ratio_low, ratio_high = _interval([each.ratio for each in drawn])
    gap_low, gap_high = _interval([each.gap for each in drawn])
    return replace(
        plain,
        low=low,
        high=high,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        reached=sum(each.share is not None for each in drawn) / DRAWS,
        gap_low=gap_low,
        gap_high=gap_high,
        detectable=_detectable(gap_low, gap_high, spread.degrees),
    )


def _deviations(spread: Noise, generator: np.random.Generator) -> list[float]:
    """A noise for each draw: what it may be by so many degrees of freedom."""
    squares = generator.chisquare(spread.degrees, DRAWS) / spread.degrees
    return (spread.deviation / np.sqrt(squares)).tolist()


def _detectable(low: float | None, high: float | None, degrees: int) -> tuple[float, ...]:
    """From the half width of the interval, as of Student's t."""
    if low is None or high is None:
        return ()
    error = (high - low) / 2 / t_quantile((1 + CONFIDENCE) / 2, degrees)
    return tuple(detectable_in_errors(power, degrees) * error for power in POWERS)


def _interval(drawn: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in drawn if value is not None]
    if not known:
        return None, None
    low, high = np.percentile(known, [50 * (1 - CONFIDENCE), 50 * (1 + CONFIDENCE)]).tolist()
    return low, high


def _noisy(curve: Curve, deviation: float, generator: np.random.Generator) -> Curve:
    """A parametric bootstrap sample of the curve; a mean over more seeds has less noise."""
    deviations = deviation / np.sqrt(curve.seeds)
    losses = np.asarray(curve.losses) + deviations * generator.standard_normal(len(curve.losses))
    return make_curve(curve.arm, curve.parameters, curve.forward_flops, losses.tolist(), curve.seeds)


# --- all of it


@dataclass(frozen=True, kw_only=True)
class IsoFlopResult:
    """curves: by budget and arm. same: how the others compare with the base, by budget. noise: None if unknown."""

    collected: GridRecords
    curves: dict[float, dict[str, Curve]]
    noise: Noise | None
    same: dict[float, list[SameLoss]]
    times: list[EqualTime]
    same_times: list[list[SameLoss]]  # as `same`, at each of `times`

    @property
    def base(self) -> str:
        """The arm that others are held against."""
        return self.collected.grid.spec.base


def find(collected: GridRecords) -> IsoFlopResult:
    """What the records say so far. Budgets without a point are left out."""
    curves: dict[float, dict[str, Curve]] = {}
    for budget in collected.grid.budgets:
        of_budget = {arm: curve(points) for (arm, b), points in collected.curves.items() if b == budget}
        if of_budget:
            curves[budget] = of_budget
    spread, times = noise(collected), equal_times(collected)
    return IsoFlopResult(
        collected=collected,
        curves=curves,
        noise=spread,
        same={budget: same_loss(found, collected.grid.spec.base, spread) for budget, found in curves.items()},
        times=times,
        same_times=[same_loss(time.curves, collected.grid.spec.base, spread) for time in times],
    )
