"""The result of an isoFLOP grid: optima, forward FLOPs at equal loss, losses after equal training times.

What compares an arm (recipe) with the base arm has intervals by a parametric bootstrap: every loss gets normal noise of
the size observed between seeds (pooled over all runs with more than one, else that of the parabolas' residuals), and
everything is fitted again. The size of the noise is itself only known to its degrees of freedom, so each draw uses
another one, from the scaled inverse chi distribution: for a single difference the interval would be Student's.
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
from skipstone_studies.isoflop.curves import Curve, GridPoint, GridRecords, Refusal, curve, make_curve, refusal


@dataclass(frozen=True, kw_only=True)
class EqualTime:
    """The losses of all arms (compared recipes) after the same number of seconds of training.

    seconds: the training time in seconds. curves: loss over model size, by arm; losses are interpolated between runs of
    different budgets. stretched: for each arm, the sizes (numbers of parameters) whose loss is extrapolated beyond the
    budgets that were run.
    """

    seconds: float
    curves: dict[str, Curve]
    stretched: dict[str, tuple[float, ...]]


@dataclass(frozen=True, kw_only=True)
class ReadOff:
    """The loss of a size after a given training time, read off a straight line between its runs at two budgets.

    loss: in nats per token. beyond: whether it is extrapolated. seeds: the number of seeds whose mean would have as
    much noise.
    """

    loss: float
    beyond: bool
    seeds: float


STRETCH = 0.3  # largest extrapolation, as a share of the distance between the outermost budgets in logarithms


def seconds_of(collected: GridRecords, point: GridPoint) -> float:
    """Return how many seconds the training of `point`, a run of an isoFLOP grid, takes.

    They are the tokens of the training divided by the speed that was measured while the arms (compared recipes) took
    turns; without such a speed, they are the seconds that the runs took, mean over seeds. collected: all stored results
    of the grid.
    """
    speed = collected.speeds.get((point.cell.arm, str(point.cell.size)))
    tokens = point.records[0].figures["training"]["tokens"]
    return point.seconds if speed is None else tokens / speed


def equal_times(collected: GridRecords) -> list[EqualTime]:
    """Return the losses of all compared recipes after equal training times, one for each two adjacent budgets.

    collected: all stored results of the grid. A time is the geometric mean of the times at both budgets, each the
    median over the base arm's sizes. There most losses can be interpolated: the loss of a size is read off a straight
    line between its budgets, over the logarithm of the seconds. Empty with fewer than two budgets.
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
    """Return the loss of a size after `seconds` of training, interpolated linearly over the logarithm of the seconds.

    points: (seconds, loss, number of seeds) of the runs with this size. None for fewer than two points, and for a time
    that is too far beyond them.
    """
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
    """The noise of one run's loss.

    deviation: standard deviation in nats per token. source: "seeds" (observed between runs that differ in the seed) or
    "residuals" (of the fitted parabolas). degrees: degrees of freedom of the estimate.
    """

    deviation: float
    source: Literal["seeds", "residuals"]
    degrees: int


@dataclass(frozen=True, kw_only=True)
class SameLoss:
    """A comparison of an arm (compared recipe) with the base arm's best model at equal training FLOPs or times.

    arm: its name. parameters: number of parameters of the smallest size on the arm's fitted curve that reaches the
    base's best loss. share: forward FLOPs per token at that size, divided by those of the base's best model. at_most:
    whether even the smallest size of the grid reaches that loss, so that share and ratio are upper bounds. ratio:
    parameters at that size, divided by those of the base's best model. parameters, share and ratio are None if no size
    reaches the loss. gap: the arm's best loss minus the base's, in nats. low, high, ratio_low, ratio_high: 90 %
    bootstrap intervals of share and ratio, over the bootstrap draws in which some size reaches the loss. reached: these
    draws as a fraction of all. gap_low, gap_high: 90 % interval of the gap. detectable: gaps that would be found with
    80 and 90 % probability. refused: why there is no verdict; "" if there is one. Intervals are None if the noise is
    not known.
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
    detectable: tuple[float, ...] = ()  # detectable gaps, at each of `intervals.POWERS`
    refused: Refusal = ""  # why there is no verdict (`depth`)

    @property
    def verdict(self) -> str:
        """The verdict on the arm's best loss beside the base's: "better" (lower), "worse", or why it is neither.

        It is "better" or "worse" if the 90 % interval of the gap excludes 0, else "not told apart"; "no interval"
        without one. If `refused` is not empty, it is the verdict.
        """
        if self.refused:
            return self.refused
        if self.gap_low is None or self.gap_high is None:
            return "no interval"
        return "better" if self.gap_high < 0 else "worse" if self.gap_low > 0 else "not told apart"


def noise(collected: GridRecords) -> Noise | None:
    """Return the noise of one run's loss, pooled over all models that were trained with several seeds.

    collected: all stored results of the isoFLOP grid. Without such models the noise is estimated from the residuals of
    parabolas of loss over size; None if these do not determine it either.
    """
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
    """Compare each arm's best loss with the base arm's, and its size at the base's best loss with the base's size.

    An arm is a compared recipe; the result has a `SameLoss` for each but the base. curves: loss over model size, by
    arm, all at one budget of training FLOPs or all after one training time. name: the name of the base arm. spread: the
    noise of one run's loss; None means no intervals. The result is empty without a curve of the base.
    """
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
    """Return a standard deviation for each bootstrap draw, distributed as its estimate's degrees of freedom imply."""
    squares = generator.chisquare(spread.degrees, DRAWS) / spread.degrees
    return (spread.deviation / np.sqrt(squares)).tolist()


def _detectable(low: float | None, high: float | None, degrees: int) -> tuple[float, ...]:
    """Return the smallest true differences that would be found with each probability in `POWERS`, as for Student's t.

    low, high: the confidence interval, whose half width gives the standard error. degrees: its degrees of freedom.
    """
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
    """Return the curve with normal noise added to its losses, and fitted again: a draw of the parametric bootstrap.

    deviation: standard deviation of one run's loss; that of a mean over n seeds is smaller by the root of n.
    """
    deviations = deviation / np.sqrt(curve.seeds)
    losses = np.asarray(curve.losses) + deviations * generator.standard_normal(len(curve.losses))
    return make_curve(curve.arm, curve.parameters, curve.forward_flops, losses.tolist(), curve.seeds)


# --- all of it


@dataclass(frozen=True, kw_only=True)
class IsoFlopResult:
    """The result of an isoFLOP grid, as far as it was run.

    collected: the stored results of its runs. curves: loss over model size, {budget in training FLOPs: {arm: curve}}.
    noise: the noise of one run's loss; None if not known. same: comparisons of the arms (compared recipes) with the
    base arm, by budget. times: losses after equal training times. same_times: comparisons with the base arm at each of
    these times.
    """

    collected: GridRecords
    curves: dict[float, dict[str, Curve]]
    noise: Noise | None
    same: dict[float, list[SameLoss]]
    times: list[EqualTime]
    same_times: list[list[SameLoss]]  # comparisons at each of `times`

    @property
    def base(self) -> str:
        """The name of the base arm: the recipe with which all others are compared."""
        return self.collected.grid.spec.base


def find(collected: GridRecords) -> IsoFlopResult:
    """Compute the result of an isoFLOP grid from its records (stored results) so far; budgets without any are left out.

    collected: the records.
    """
    curves: dict[float, dict[str, Curve]] = {}
    for budget in collected.grid.budgets:
        of_budget = {arm: curve(points) for (arm, b), points in collected.curves.items() if b == budget}
        if of_budget:
            curves[budget] = of_budget
    spread, times = noise(collected), equal_times(collected)

    def compared(of: Mapping[str, Curve], budget: float) -> list[SameLoss]:
        found = same_loss(of, collected.grid.spec.base, spread)
        return [replace(one, refused=refusal(collected, one.arm, budget)) for one in found]

    return IsoFlopResult(
        collected=collected,
        curves=curves,
        noise=spread,
        same={budget: compared(found, budget) for budget, found in curves.items()},
        times=times,
        same_times=[compared(time.curves, max(curves)) for time in times],
    )
