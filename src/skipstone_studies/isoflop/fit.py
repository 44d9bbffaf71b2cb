"""A parabola of loss over the logarithm of size, its optimum, and where it first comes down to a level."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

Where = Literal["inside", "smallest size", "largest size", "opens downward", "too few sizes"]
INSIDE: Final = "inside"
LOW: Final = "smallest size"
HIGH: Final = "largest size"
DOWNWARD: Final = "opens downward"
FEW: Final = "too few sizes"


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """x: the size; loss: there. where: inside the grid, or why the lowest measured point stands in for an optimum."""

    x: float
    loss: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class Fit:
    """loss(x) = a (ln x - middle)^2 + b (ln x - middle) + c, for x within [low, high]; coefficients (a, b, c).

    optimum: the vertex if it is a minimum within the grid. residuals: of the points, in nats.
    """

    coefficients: tuple[float, float, float]
    middle: float
    low: float
    high: float
    optimum: Optimum
    residuals: tuple[float, ...]

    def __call__(self, x: float) -> float:
        a, b, c = self.coefficients
        u = math.log(x) - self.middle
        return (a * u + b) * u + c

    @property
    def usable(self) -> bool:
        """Whether there is a parabola, and it opens upward."""
        return self.optimum.where not in (DOWNWARD, FEW)

    def first_below(self, level: float) -> float | None:
        """The smallest x in [low, high] whose loss is at most `level`; None where there is none, or no parabola.

        One that opens downward says nothing: it is below the level at its ends and not between them.
        """
        if not self.usable:
            return None
        if self(self.low) <= level:
            return self.low
        a, b, c = self.coefficients
        discriminant = b * b - 4 * a * (c - level)
        if discriminant < 0:
            return None
        u = (-b - math.sqrt(discriminant)) / (2 * a)
        x = math.exp(u + self.middle)
        return x if self.low <= x <= self.high * (1 + 1e-12) else None


def fit(xs: Sequence[float], losses: Sequence[float]) -> Fit:
    """Least squares through at least one point; fewer than three sizes make no parabola. x above 0, all different."""
    u = np.log(np.asarray(xs, np.float64))
    y = np.asarray(losses, np.float64)
    middle = float(u.mean())
    if len(xs) < 3:
        best = int(y.argmin())
        optimum = Optimum(x=float(xs[best]), loss=float(y[best]), where=FEW)
        coefficients, residuals = (0.0, 0.0, float(y.mean())), ()
    else:
        a, b, c = (float(value) for value in np.polyfit(u - middle, y, 2))
        coefficients = (a, b, c)
        residuals = tuple((y - np.polyval(coefficients, u - middle)).tolist())
        optimum = _optimum(coefficients, u - middle, y, xs)
    return Fit(
        coefficients=coefficients,
        middle=middle,
        low=float(min(xs)),
        high=float(max(xs)),
        optimum=optimum,
        residuals=residuals,
    )


def _optimum(
    coefficients: tuple[float, float, float], u: NDArray[np.float64], y: NDArray[np.float64], xs: Sequence[float]
) -> Optimum:
    a, b, c = coefficients
    vertex = -b / (2 * a) if a > 0 else math.nan
    if u.min() <= vertex <= u.max():
        log_x = vertex + float(np.log(np.asarray(xs, np.float64)).mean())
        return Optimum(x=math.exp(log_x), loss=c - b * b / (4 * a), where=INSIDE)
    best = int(y.argmin())
    where: Where = DOWNWARD if not a > 0 else LOW if vertex < u.min() else HIGH
    if where in (LOW, HIGH):  # the parabola falls towards that end, so that is where its best is
        best = int(u.argmin() if where == LOW else u.argmax())
    return Optimum(x=float(xs[best]), loss=float(y[best]), where=where)
