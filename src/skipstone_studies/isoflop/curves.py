"""An arm's points at one budget, or at one time, with the parabola through them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from skipstone_studies.isoflop.fit import Fit, fit
from skipstone_studies.isoflop.points import Point


@dataclass(frozen=True, kw_only=True)
class Curve:
    """An arm at a budget (or at a time). forward: FLOPs of a token by size, straight in logarithms between points."""

    arm: str
    parameters: tuple[float, ...]
    forward_flops: tuple[float, ...]
    losses: tuple[float, ...]
    seeds: tuple[int, ...]
    fit: Fit

    def forward(self, parameters: float) -> float:
        """Executed FLOPs of a token at a size within the grid."""
        xs, ys = np.log(self.parameters), np.log(self.forward_flops)
        return float(np.exp(np.interp(math.log(parameters), xs, ys)))


def curve(points: Sequence[Point]) -> Curve:
    return make_curve(
        points[0].cell.arm,
        [point.parameters for point in points],
        [point.forward_flops for point in points],
        [point.loss for point in points],
        [len(point.records) for point in points],
    )


def make_curve(
    arm: str, xs: Sequence[float], forward: Sequence[float], losses: Sequence[float], seeds: Sequence[int]
) -> Curve:
    return Curve(
        arm=arm,
        parameters=tuple(map(float, xs)),
        forward_flops=tuple(forward),
        losses=tuple(losses),
        seeds=tuple(seeds),
        fit=fit(xs, losses),
    )
