"""The runs of an isoFLOP study, a line each. It can be stopped anywhere; what is recorded is never run again."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from skipstone.data.prepare import PreparedData
from skipstone.runs import Run
from skipstone.train.training import train
from skipstone_studies import record as records
from skipstone_studies.isoflop.grid import CorpusFacts, Grid, GridCell
from skipstone_studies.isoflop.measure import CoreUse, figures, watched
from skipstone_studies.pace import duration
from skipstone_studies.session import USER_ERRORS, Session
from skipstone_studies.study import seeded
from skipstone_studies.timing import training_speeds

Wanted = tuple[GridCell, int]  # a run: cell and seed


@dataclass(kw_only=True)
class GridSession(Session):
    """`Session` with cells for arms; its arms are the cells' recipes by label, filled in as stages begin."""

    grid: Grid
    facts: CorpusFacts
    line: str
    cells: dict[str, GridCell] = field(default_factory=dict)
    done_flops: float = 0.0  # in this process
    left_flops: float = 0.0  # of everything still to do, later stages included
    after: Callable[[], object]

    @property
    def command(self) -> str:
        return self.line

    def add(self, cells: Sequence[GridCell]) -> None:
        self.cells |= {cell.label: cell for cell in cells}
        self.arms = {label: cell.recipe for label, cell in self.cells.items()}

    def run_all(self, stage: str, wanted: Sequence[Wanted]) -> None:
        """Those that are not recorded yet."""
        self.add([cell for cell, _ in wanted])
        left = [(cell, seed) for cell, seed in wanted if self.recorded(cell.label, seed) is None]
        if len(left) < len(wanted):
            self.say(f"{stage}: {len(wanted) - len(left)} of {len(wanted)} runs are recorded already")
        for number, (cell, seed) in enumerate(left, 1):
            self._one(f"{stage} {number}/{len(left)}", cell, seed)
            self.left_flops -= cell.flops
        if left:
            self.after()

    def _one(self, where: str, cell: GridCell, seed: int) -> None:
        start, label = time.perf_counter(), cell.label
        try:
            found = self._trained(cell, seed)
        except USER_ERRORS as error:
            self.failures.append(f"{label}, seed {seed}: {' '.join(str(error).split())}")
            self.console.print(self.failures[-1], style="red", markup=False, highlight=False, soft_wrap=True)
            return
        self._record(label, seed, found)
        self.spent.append(time.perf_counter() - start)
        self.done_flops += cell.flops
        left = sum(self.spent) / self.done_flops * max(self.left_flops - cell.flops, 0.0)
        self.say(
            f"{where}  {label} seed {seed}: loss {found['loss']:.4f}, {cell.steps:,} steps, "
            f"{duration(self.spent[-1])}; {duration(left)} to go"
        )

    def _trained(self, cell: GridCell, seed: int) -> dict[str, Any]:
        folder, recipe = self.folder(cell.label, seed), seeded(cell.recipe, seed)
        self._claim(folder, recipe)
        clock = CoreUse()
        if not (folder.is_dir() and Run(folder).finished):
            with watched() as clock:
                train(
                    recipe,
                    out=folder,
                    resume=folder.is_dir(),
                    progress=self.console.is_terminal,
                    data=self._rows(seed),
                )
        return figures(cell, folder, self.facts, clock)

    def _rows(self, seed: int) -> PreparedData:
        """The corpus is read once for all runs; a seed has its own order of it."""
        data = self.facts.data
        assert data is not None
        assert data.train is not None
        changed: dict[str, Any] = {"seed": seed}
        return replace(data, config=replace(data.config, **changed), train=replace(data.train, **changed))

    def time_in_turns(self, sizes: Mapping[str, Mapping[str, GridCell]], seed: int) -> None:
        """Training steps of each size's arms, interleaved, so that they compare whatever else the machine does.

        sizes: by size, the cells by arm; one budget's, because a step does not depend on how many there are.
        """
        for size, cells in sizes.items():
            self.add(list(cells.values()))
            found = {
                arm: record for arm, cell in cells.items() if (record := self.recorded(cell.label, seed)) is not None
            }
            here = {arm: self.folder(cells[arm].label, seed) for arm in found if self._is_here(cells[arm].label, seed)}
            if not here or all(record.timing_session is not None for record in found.values()):
                continue
            self.say(f"timing the steps of {', '.join(here)} at {size} in turns")
            speeds = training_speeds(here)
            session = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "arms": list(here)}
            for arm in here:
                figures_now = {**found[arm].figures, "training_speed": speeds[arm]}
                records.write(replace(found[arm], figures=figures_now, timing_session=session), self.out)
        self.after()
