"""Curves of an isoFLOP grid: collect records as points and fit a parabola of loss over the logarithm of model size.

Also finds whether deeper models have a lower loss; if not, arms (compared recipes) that route tokens are judged neither
better nor worse than the base arm. Everything follows from the specification and the records (stored results of runs).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from skipstone_studies import record as records
from skipstone_studies.headroom import LEAST
from skipstone_studies.isoflop.grid import Grid, GridCell
from skipstone_studies.record import Record, digest

Where = Literal["inside", "smallest size", "largest size", "opens downward", "too few sizes"]
INSIDE: Final = "inside"
LOW: Final = "smallest size"
HIGH: Final = "largest size"
DOWNWARD: Final = "opens downward"
FEW: Final = "too few sizes"
Refusal = Literal["", "no headroom", "headroom not known"]  # of a verdict on a routed arm


@dataclass(frozen=True, kw_only=True)
class Optimum:
    """The optimum of a curve of loss over model size.

    x: the size, in parameters. loss: the loss there, in nats per token. where: "inside" if it is the vertex of the
    parabola, within the measured sizes. Otherwise a measured point is given: the smallest or largest size if the vertex
    lies beyond it ("smallest size", "largest size"), else the one with the lowest loss ("opens downward", "too few
    sizes").
    """

    x: float
    loss: float
    where: Where


@dataclass(frozen=True, kw_only=True)
class Fit:
    """The parabola loss(x) = a (ln x - middle)^2 + b (ln x - middle) + c, fitted by least squares to sizes x.

    coefficients: (a, b, c). middle: the mean of ln x. low, high: smallest and largest fitted size. Calling the fit with
    a size returns the fitted loss. optimum: the vertex if it is a minimum within [low, high], else a measured point.
    residuals: measured minus fitted losses, in nats; empty for fewer than three sizes, which determine no parabola.
    """

    coefficients: tuple[float, float, float]
    middle: float
    low: float
    high: float
    optimum: Optimum
    residuals: tuple[float, ...]

    def __call__(self, x: float) -> float:
        """Return the fitted loss at size x."""
        a, b, c = self.coefficients
        u = math.log(x) - self.middle
        return (a * u + b) * u + c

    @property
    def usable(self) -> bool:
        """Whether there is a parabola and it opens upward."""
        return self.optimum.where not in (DOWNWARD, FEW)

    def first_below(self, level: float) -> float | None:
        """Return the smallest size x in [low, high] whose fitted loss is at most `level`.

        None if no size is, if there is no parabola, or if it opens downward.
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
    """Fit a parabola of loss over the logarithm of size by least squares.

    xs: sizes, positive and distinct (not checked). losses: the losses in nats. For fewer than three sizes there is no
    parabola: the optimum of the result is the lowest point, and the residuals are empty.
    """
    middle, u, solution = _sizes(tuple(xs))
    y = np.asarray(losses, np.float64)
    if len(xs) < 3:
        best = int(y.argmin())
        optimum = Optimum(x=float(xs[best]), loss=float(y[best]), where=FEW)
        coefficients, residuals = (0.0, 0.0, float(y.mean())), ()
    else:
        a, b, c = (solution @ y).tolist()
        coefficients = (a, b, c)
        residuals = tuple((y - ((a * u + b) * u + c)).tolist())
        optimum = _optimum(coefficients, u, y, xs, middle)
    return Fit(
        coefficients=coefficients,
        middle=middle,
        low=float(min(xs)),
        high=float(max(xs)),
        optimum=optimum,
        residuals=residuals,
    )


@cache
def _sizes(xs: tuple[float, ...]) -> tuple[float, NDArray[np.float64], NDArray[np.float64]]:
    """Return the mean of ln x, ln x minus it, and the matrix that turns losses into coefficients.

    The result is cached, because a bootstrap fits the same sizes thousands of times.
    """
    u = np.log(np.asarray(xs, np.float64))
    middle = float(u.mean())
    return middle, u - middle, np.asarray(np.linalg.pinv(np.vander(u - middle, 3)), np.float64)


def _optimum(
    coefficients: tuple[float, float, float],
    u: NDArray[np.float64],
    y: NDArray[np.float64],
    xs: Sequence[float],
    middle: float,
) -> Optimum:
    a, b, c = coefficients
    vertex = -b / (2 * a) if a > 0 else math.nan
    if u.min() <= vertex <= u.max():
        return Optimum(x=math.exp(vertex + middle), loss=c - b * b / (4 * a), where=INSIDE)
    best = int(y.argmin())
    where: Where = DOWNWARD if not a > 0 else LOW if vertex < u.min() else HIGH
    if where in (LOW, HIGH):  # the parabola falls towards that end
        best = int(u.argmin() if where == LOW else u.argmax())
    return Optimum(x=float(xs[best]), loss=float(y[best]), where=where)


FOLDER = "grid"  # folder of the records, in place of a scale's name
Lookup = Callable[[GridCell, int], Record | None]


def lookup(out: Path, name: str) -> Lookup:
    """Return a function that finds the record of a run of an isoFLOP grid, given its cell and seed.

    A cell is a run without its seed. The function returns None if there is no record, or only one that was made with
    another recipe than the cell's. out: the folder of records (stored results of runs). name: the name of the grid.
    """
    return partial(_find, out, name)


def _find(out: Path, name: str, cell: GridCell, seed: int) -> Record | None:
    record = records.find(out, name, FOLDER, cell.label, seed)
    return record if record is not None and record.digest == digest(cell.recipe) else None


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """A run of an isoFLOP grid (arm, budget, size, learning rate) with the records of all its seeds.

    An arm is a compared recipe, a budget a number of training FLOPs. cell: the run without its seed. records: the
    stored results, one for each seed, of which that with the grid's first seed comes first.
    """

    cell: GridCell
    records: tuple[Record, ...]

    @property
    def losses(self) -> list[float]:
        """The validation losses of all seeds, in nats per token."""
        return [record.figures["loss"] for record in self.records]

    @property
    def loss(self) -> float:
        """The validation loss in nats per token, mean over seeds."""
        return statistics.fmean(self.losses)

    @property
    def parameters(self) -> int:
        """The number of parameters of the model."""
        return self.cell.shape.parameters

    @property
    def forward_flops(self) -> float:
        """The executed forward FLOPs per token, mean over seeds."""
        return statistics.fmean(record.figures["forward_flops"] for record in self.records)

    @property
    def seconds(self) -> float:
        """The seconds of training as measured by the runs themselves, mean over seeds."""
        return statistics.fmean(record.figures["training"]["seconds"] for record in self.records)


@dataclass(frozen=True, kw_only=True)
class GridRecords:
    """All records (stored results of runs) of an isoFLOP grid that exist so far.

    grid: the runs that its specification describes. An arm is a compared recipe. sweep: losses of the runs that try
    learning rates, {arm: {rate: loss}}, in nats. chosen: the best learning rate of each arm. curves: the points in
    order of size, by (arm, budget in training FLOPs). speeds: training tokens per second by (arm, size such as "32x4"),
    measured while the arms of a size took turns.
    """

    grid: Grid
    sweep: dict[str, dict[float, float]]
    chosen: dict[str, float]
    curves: dict[tuple[str, float], list[GridPoint]]
    speeds: dict[tuple[str, str], float]

    @property
    def records(self) -> list[Record]:
        """The stored results of all runs that are points of curves, not of those that only try learning rates."""
        return [record for points in self.curves.values() for point in points for record in point.records]

    def __iter__(self) -> Iterator[GridPoint]:
        return (point for points in self.curves.values() for point in points)


def collect(grid: Grid, find: Lookup) -> GridRecords:
    """Collect the records (stored results of runs) of an isoFLOP grid that exist so far.

    grid: the runs that its specification describes. find: a function that returns the record of a run, given the run
    without its seed (a `GridCell`) and the seed, or None if there is none.
    """
    sweep = {arm: _sweep(grid, arm, find) for arm in grid.spec.arms}
    chosen = {arm: min(losses, key=losses.__getitem__) for arm, losses in sweep.items() if losses}
    if len(grid.spec.rates) == 1:  # nothing to choose
        chosen = dict.fromkeys(grid.spec.arms, grid.spec.rates[0])
    curves: dict[tuple[str, float], list[GridPoint]] = {}
    speeds: dict[tuple[str, str], float] = {}
    for arm, rate in chosen.items():
        for cell in grid.cells(arm, rate):
            seeds = [grid.spec.seed, *grid.other_seeds]
            found = tuple(record for seed in seeds if (record := find(cell, seed)) is not None)
            if found and found[0].seed == grid.spec.seed:
                curves.setdefault((arm, cell.budget), []).append(GridPoint(cell=cell, records=found))
            for record in found:
                if "training_speed" in record.figures:
                    speeds[arm, str(cell.size)] = record.figures["training_speed"]["tokens_per_second"]
    return GridRecords(grid=grid, sweep=sweep, chosen=chosen, curves=curves, speeds=speeds)


def _sweep(grid: Grid, arm: str, find: Lookup) -> dict[float, float]:
    found = {cell.rate: find(cell, grid.spec.seed) for cell in grid.sweep(arm)}
    return {rate: record.figures["loss"] for rate, record in found.items() if record is not None}


def nearest_optimum(points: list[GridPoint]) -> GridCell:
    """Return the run (without its seed) whose model size is nearest to the optimum of loss over size.

    points: the points of one arm (compared recipe) and budget (training FLOPs), through which a parabola is fitted;
    only the first seed of each is used.
    """
    xs, ys = [point.parameters for point in points], [point.losses[0] for point in points]
    best = fit(xs, ys).optimum.x
    return min(points, key=lambda point: abs(point.parameters / best - 1)).cell


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Loss over model size for one arm (compared recipe), at one budget of FLOPs or after one training time.

    arm: name of the arm. parameters: the sizes, in number of parameters. forward_flops: executed forward FLOPs per
    token at each size. losses: mean over seeds, in nats. seeds: number of seeds of each loss (for interpolated losses,
    the number whose mean has as much noise). fit: the parabola through them.
    """

    arm: str
    parameters: tuple[float, ...]
    forward_flops: tuple[float, ...]
    losses: tuple[float, ...]
    seeds: tuple[float, ...]
    fit: Fit

    def forward(self, parameters: float) -> float:
        """Return the executed forward FLOPs per token at the size `parameters`, interpolated linearly in logarithms."""
        xs, ys = np.log(self.parameters), np.log(self.forward_flops)
        return float(np.exp(np.interp(math.log(parameters), xs, ys)))


def curve(points: Sequence[GridPoint]) -> Curve:
    """Return the curve of loss over model size through `points` of one arm (compared recipe) and FLOP budget."""
    return make_curve(
        points[0].cell.arm,
        [point.parameters for point in points],
        [point.forward_flops for point in points],
        [point.loss for point in points],
        [len(point.records) for point in points],
    )


def make_curve(
    arm: str, xs: Sequence[float], forward: Sequence[float], losses: Sequence[float], seeds: Sequence[float]
) -> Curve:
    """Build a curve of loss over model size, and fit its parabola.

    arm: name of the compared recipe. xs: sizes in number of parameters. forward, losses, seeds: for each size, executed
    forward FLOPs per token, loss in nats, and number of seeds of the loss.
    """
    return Curve(
        arm=arm,
        parameters=tuple(map(float, xs)),
        forward_flops=tuple(forward),
        losses=tuple(losses),
        seeds=tuple(seeds),
        fit=fit(xs, losses),
    )


def gain_of_depth(points: Sequence[GridPoint]) -> float | None:
    """Return by how many nats the deepest model of a width beats the best shallower one of that width.

    points: the points of one arm (compared recipe) and budget (training FLOPs). The gain is negative if a shallower
    model is better. The largest over all widths is returned; None if no width was run with two numbers of blocks.
    """
    found = []
    for width in {point.cell.size.width for point in points}:
        of_width = {point.cell.size.blocks: point.loss for point in points if point.cell.size.width == width}
        deepest = max(of_width)
        shallower = [loss for blocks, loss in of_width.items() if blocks < deepest]
        found += [min(shallower) - of_width[deepest]] if shallower else []
    return max(found, default=None)


def refusal(collected: GridRecords, arm: str, budget: float) -> Refusal:
    """Return why no verdict is given on an arm at a budget; "" if one is given.

    An arm that routes tokens gets a verdict only if deeper models of the base arm, with which it is compared, have a
    loss that is lower by at least 0.02 nats; otherwise leaving blocks out altogether would do as well. The reasons are
    "no headroom", and "headroom not known" if the base arm was not run with two numbers of blocks. collected: all
    stored results of the grid. arm: name of the arm. budget: the training FLOPs of a run.
    """
    if not collected.grid.spec.known[arm].get("mechanisms"):
        return ""
    base = collected.curves.get((collected.grid.spec.base, budget), [])
    known = gain_of_depth(base)
    return "headroom not known" if known is None else "" if known >= LEAST else "no headroom"
