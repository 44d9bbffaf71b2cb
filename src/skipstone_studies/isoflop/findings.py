"""Points -> what they say: optima, the FLOPs a forward pass for the same loss, and their spread; equal times.

The spread is a parametric bootstrap: every loss gets normal noise of the size that seeds show (pooled over all cells
with more than one; else that of the parabolas' residuals), and everything is fitted again.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from skipstone_studies.isoflop.curves import Curve, curve, make_curve
from skipstone_studies.isoflop.points import Collected
from skipstone_studies.isoflop.times import EqualTime, equal_times

DRAWS, INTERVAL = 1000, (5.0, 95.0)  # per cent


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


def noise(collected: Collected) -> Noise | None:
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
    drawn = [_compared(_noisy(base, spread, generator), _noisy(other, spread, generator)) for _ in range(DRAWS)]
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
    )


def _interval(drawn: Sequence[float | None]) -> tuple[float | None, float | None]:
    known = [value for value in drawn if value is not None]
    if not known:
        return None, None
    low, high = np.percentile(known, INTERVAL).tolist()
    return low, high


def _noisy(curve: Curve, spread: Noise, generator: np.random.Generator) -> Curve:
    """The same curve with other seeds, as it were; a mean over more seeds has less noise."""
    deviations = spread.deviation / np.sqrt(curve.seeds)
    losses = np.asarray(curve.losses) + deviations * generator.standard_normal(len(curve.losses))
    return make_curve(curve.arm, curve.parameters, curve.forward_flops, losses.tolist(), curve.seeds)


# --- all of it


@dataclass(frozen=True, kw_only=True)
class Findings:
    """curves: by budget and arm. same: how the others compare with the base, by budget. noise: None if unknown."""

    collected: Collected
    curves: dict[float, dict[str, Curve]]
    noise: Noise | None
    same: dict[float, list[SameLoss]]
    times: list[EqualTime]

    @property
    def base(self) -> str:
        """The arm that others are held against."""
        return self.collected.grid.spec.base


def find(collected: Collected) -> Findings:
    """What the records say so far. Budgets without a point are left out."""
    curves: dict[float, dict[str, Curve]] = {}
    for budget in collected.grid.budgets:
        of_budget = {arm: curve(points) for (arm, b), points in collected.curves.items() if b == budget}
        if of_budget:
            curves[budget] = of_budget
    spread = noise(collected)
    return Findings(
        collected=collected,
        curves=curves,
        noise=spread,
        same={budget: same_loss(found, collected.grid.spec.base, spread) for budget, found in curves.items()},
        times=equal_times(collected),
    )
