"""The estimate: every run with its FLOPs and hours, before anything is trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from skipstone.evaluate.tables import Section, percent
from skipstone.report.axes import short
from skipstone_studies.isoflop.clock import Pace
from skipstone_studies.isoflop.corpus import Facts, share, tokens_per_step
from skipstone_studies.isoflop.grid import Cell, Grid, Shape, compact

FORWARD = 1 / 3  # of a row's training time: what validation takes of it


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """seconds: of a run: training and validation. source: of the paces, in words."""

    grid: Grid
    facts: Facts
    paces: Mapping[Shape, Pace]
    source: str = "from a few training steps on random tokens, on this machine as busy as it was just now"

    def seconds(self, cell: Cell) -> float:
        pace, batch = self.paces[cell.shape], self.grid.base.train.batch_size
        rows = 0 if self.facts.data is None else len(self.facts.data.validation)
        return cell.steps * pace.step(batch) + FORWARD * rows * pace.row

    def sections(self) -> list[Section]:
        return [self._runs(), self._total()]

    def _runs(self) -> Section:
        notes = [] if not self.facts.trouble else [f"{self.facts.trouble}: shares of it are unknown."]
        if any(not pace.measured for pace in self.paces.values()):
            notes.append("~ was not timed: it is taken to run at the FLOPs per second of the arm's largest that was.")
        return Section(
            title=f"{self.grid.spec.name}: the grid, a run a line",
            columns=["budget", "size", "arm", "params", "steps", "tokens", "corpus", "FLOPs", "time"],
            rows=[self._row(cell) for cell in self.grid.everything()],
            notes=notes,
        )

    def _row(self, cell: Cell) -> list[str]:
        mark = "" if self.paces[cell.shape].measured else "~"
        return [
            compact(cell.budget),
            str(cell.size),
            cell.arm,
            short(cell.shape.parameters),
            f"{cell.steps:,}" if cell.steps < 1e5 else short(cell.steps),
            short(cell.steps * tokens_per_step(self.grid)),
            percent(share(self.grid, cell, self.facts)),
            compact(float(f"{cell.flops:.3g}")),
            mark + duration(self.seconds(cell)),
        ]

    def parts(self) -> dict[str, list[Cell]]:
        """Runs by what they are for. The optima are not known yet: their seeds are taken at the middle size."""
        grid, arms = self.grid, self.grid.spec.arms
        middle = [grid.cell(arm, budget, grid.middle, grid.spec.rates[0]) for arm in arms for budget in grid.budgets]
        return {
            "learning rates, beyond the grid's own": [cell for arm in arms for cell in grid.sweep(arm)[1:]],
            "grid": grid.everything(),
            "further seeds at the optima": middle * len(grid.other_seeds),
        }

    def _total(self) -> Section:
        parts = self.parts()
        rows = [[name, *self._sum(cells)] for name, cells in parts.items()]
        return Section(
            title="all runs, one after the other",
            columns=["", "runs", "FLOPs", "time"],
            rows=[*rows, ["all", *self._sum([cell for cells in parts.values() for cell in cells])]],
            notes=[f"Time: {self.source}."],
        )

    def _sum(self, cells: list[Cell]) -> list[str]:
        return [
            str(len(cells)),
            compact(float(f"{sum(c.flops for c in cells):.3g}")),
            duration(sum(map(self.seconds, cells))),
        ]


def duration(seconds: float) -> str:
    """Seconds up to two minutes, minutes up to two hours, then hours, days, years."""
    for unit, name, limit in ((1, "s", 120), (60, "min", 7200), (3600, "h", 172_800), (86_400, "d", 8.64e7)):
        if seconds < limit:
            return f"{seconds / unit:,.0f} {name}" if unit == 1 else f"{seconds / unit:,.1f} {name}"
    return f"{seconds / 31_557_600:,.1f} y"
