"""Records -> the points of the grid. Nothing is known here that is not in the spec and the records."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from skipstone_studies import record as records
from skipstone_studies.isoflop.fit import fit
from skipstone_studies.isoflop.grid import Cell, Grid
from skipstone_studies.record import Record, digest

FOLDER = "grid"  # of the records, where `reproduce` has its scales
Lookup = Callable[[Cell, int], Record | None]


def lookup(out: Path, name: str) -> Lookup:
    """Finds the record of a run, if it was made with the recipe that the run has now."""
    return partial(_find, out, name)


def _find(out: Path, name: str, cell: Cell, seed: int) -> Record | None:
    record = records.find(out, name, FOLDER, cell.label, seed)
    return record if record is not None and record.digest == digest(cell.recipe) else None


@dataclass(frozen=True, kw_only=True)
class Point:
    """A cell with the records of its seeds, the grid's first."""

    cell: Cell
    records: tuple[Record, ...]

    @property
    def losses(self) -> list[float]:
        return [record.figures["loss"] for record in self.records]

    @property
    def loss(self) -> float:
        return statistics.fmean(self.losses)

    @property
    def parameters(self) -> int:
        return self.cell.shape.parameters

    @property
    def forward_flops(self) -> float:
        """Of a token, as executed."""
        return statistics.fmean(record.figures["forward_flops"] for record in self.records)

    @property
    def seconds(self) -> float:
        """Of training, as the runs took."""
        return statistics.fmean(record.figures["training"]["seconds"] for record in self.records)


@dataclass(frozen=True, kw_only=True)
class Collected:
    """sweep: losses by arm and rate. chosen: the best rate of each arm. curves: points by size, for (arm, budget).

    speeds: training tokens a second by (arm, size), timed in turns; what is not there yet is missing everywhere.
    """

    grid: Grid
    sweep: dict[str, dict[float, float]]
    chosen: dict[str, float]
    curves: dict[tuple[str, float], list[Point]]
    speeds: dict[tuple[str, str], float]

    @property
    def records(self) -> list[Record]:
        return [record for points in self.curves.values() for point in points for record in point.records]

    def __iter__(self) -> Iterator[Point]:
        return (point for points in self.curves.values() for point in points)


def collect(grid: Grid, find: Lookup) -> Collected:
    sweep = {arm: _sweep(grid, arm, find) for arm in grid.spec.arms}
    chosen = {arm: min(losses, key=losses.__getitem__) for arm, losses in sweep.items() if losses}
    if len(grid.spec.rates) == 1:  # nothing to choose
        chosen = dict.fromkeys(grid.spec.arms, grid.spec.rates[0])
    curves: dict[tuple[str, float], list[Point]] = {}
    speeds: dict[tuple[str, str], float] = {}
    for arm, rate in chosen.items():
        for cell in grid.cells(arm, rate):
            seeds = [grid.spec.seed, *grid.other_seeds]
            found = tuple(record for seed in seeds if (record := find(cell, seed)) is not None)
            if found and found[0].seed == grid.spec.seed:
                curves.setdefault((arm, cell.budget), []).append(Point(cell=cell, records=found))
            for record in found:
                if "training_speed" in record.figures:
                    speeds[arm, str(cell.size)] = record.figures["training_speed"]["tokens_per_second"]
    return Collected(grid=grid, sweep=sweep, chosen=chosen, curves=curves, speeds=speeds)


def _sweep(grid: Grid, arm: str, find: Lookup) -> dict[float, float]:
    found = {cell.rate: find(cell, grid.spec.seed) for cell in grid.sweep(arm)}
    return {rate: record.figures["loss"] for rate, record in found.items() if record is not None}


def nearest_optimum(points: list[Point]) -> Cell:
    """The grid's size nearest to the optimum that the first seeds show."""
    xs, ys = [point.parameters for point in points], [point.losses[0] for point in points]
    best = fit(xs, ys).optimum.x
    return min(points, key=lambda point: abs(point.parameters / best - 1)).cell
