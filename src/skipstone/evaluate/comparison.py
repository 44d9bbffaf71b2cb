"""`compare`: measure several runs on the same machine within minutes, and show them side by side."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from skipstone.core.progress_bar import advance, work
from skipstone.core.strict import PlainDict
from skipstone.evaluate.loaded_run import LoadedRun, load_run
from skipstone.evaluate.metrics import (
    RunMetrics,
    capacity_section,
    headroom_section,
    main_section,
    run_metrics,
    sample_ids,
    speed_tasks,
)
from skipstone.evaluate.tables import Section, markdown, plain, rich_table
from skipstone.measure.losses import headroom
from skipstone.measure.speed import Rate, take_turns
from skipstone.runs import distinct_names

if TYPE_CHECKING:
    from rich.table import Table

ROUNDS = 5  # timings of each task, after one to warm up
COLUMNS = 6  # runs that fit beside each other on 120 columns


@dataclass(frozen=True, kw_only=True, eq=False)
class Comparison:
    """Figures of several runs, in the order in which they were named.

    runs: the figures of each run. machine: the keys `device`, `threads` and `torch` (its version). dense, forced: on a
    synthetic corpus that marks the tokens that need depth, the figures of a run without routing and of a run that keeps
    these tokens; None if no such runs were named.
    """

    runs: tuple[RunMetrics, ...]
    machine: PlainDict
    dense: RunMetrics | None = None
    forced: RunMetrics | None = None

    @property
    def captured(self) -> dict[str, dict[str, float]]:
        """For each run, the share of the gap between two reference runs' accuracies that it closes.

        It is {name of the run: {bin of difficulty: share}}, with the bins "0-3", "4-7", "8-15", "16+" and "all
        operations". The references are the dense run (share 0) and the run that keeps the tokens marked as needing
        depth (share 1). Difficulty is the number of operations on which a token of a synthetic corpus depends. A share
        is nan if the references are equally accurate. Empty unless both were named.
        """
        if self.dense is None or self.forced is None:
            return {}
        dense, forced = self.dense.accuracy, self.forced.accuracy
        assert dense is not None
        assert forced is not None
        return {run.name: headroom(run.accuracy, dense, forced) for run in self.runs if run.accuracy is not None}

    def to_dict(self) -> PlainDict:
        """Return plain values for JSON: "machine", "runs", "twins" and "headroom_captured".

        "runs" is a list of each run's figures. "twins" has those of the two reference runs, if they were named: "dense"
        (without routing) and "forced" (keeps the tokens marked as needing depth). "headroom_captured" says which share
        of the gap between their accuracies each run closes (property `captured`). FLOPs and bytes are per token, shares
        in [0, 1], energy in joules.
        """
        twins = {"dense": self.dense, "forced": self.forced}
        return plain(
            {
                "machine": self.machine,
                "runs": [run.to_dict() for run in self.runs],
                "twins": {name: twin.to_dict() for name, twin in twins.items() if twin is not None},
                "headroom_captured": self.captured,
            }
        )

    def markdown(self) -> str:
        """Return the tables in Markdown, with runs as columns."""
        return markdown(self._sections(len(self.runs)))

    def table(self) -> Table:
        """Return the tables as an object of rich for printing on a terminal, with up to six runs side by side."""
        return rich_table(self._sections(COLUMNS))

    def _sections(self, width: int) -> list[Section]:
        parts = [self.runs[start : start + width] for start in range(0, len(self.runs), width)]
        make: list[Callable[[Sequence[RunMetrics]], Section | None]] = [main_section, capacity_section]
        found = [section for function in make for part in parts if (section := function(part)) is not None]
        if self.dense is not None and self.forced is not None:
            found.append(headroom_section(self.runs, self.dense, self.forced, self.captured))
        found[-1] = replace(
            found[-1], notes=[*found[-1].notes, ", ".join(f"{k}: {v}" for k, v in self.machine.items())]
        )
        return found


def compare(
    runs: Sequence[Path], *, dense: Path | None = None, forced: Path | None = None, rounds: int = ROUNDS
) -> Comparison:
    """Measure several runs on the same machine, and time them in alternation.

    runs: run folders or saved models. dense, forced: both or neither, and only if all runs were trained on a synthetic
    corpus that marks the tokens that need depth (such as Reset-S3): a run without routing that executes as many FLOPs,
    and a run that keeps the marked tokens. Each run's accuracy is then reported as a position between the accuracies of
    these two. rounds: timings of each task after one to warm up. Returns the figures of all runs, which can be printed
    as a table and written as JSON or Markdown. Raises ValueError or FileNotFoundError for folders that cannot be
    measured.
    """
    if not runs:
        raise ValueError("name at least one run to compare")
    if (dense is None) != (forced is None):
        raise ValueError("headroom lies between two runs: name both the dense and the forced one, or none")
    folders = [*runs, *(twin for twin in (dense, forced) if twin is not None)]
    loaded = [load_run(folder) for folder in folders]
    if dense is not None:
        _check_twins(loaded)
    measured = _measured(loaded, rounds)
    return Comparison(
        runs=tuple(measured[: len(runs)]),
        machine=_machine(loaded[0].model.device),
        dense=measured[-2] if dense is not None else None,
        forced=measured[-1] if forced is not None else None,
    )


def _measured(loaded: Sequence[LoadedRun], rounds: int) -> list[RunMetrics]:
    others = next((o for o in loaded if o.data is not None and o.data.tokenizer is not None), None)
    length = min(o.context for o in loaded)
    tasks = {
        (i, name): task
        for i, o in enumerate(loaded)
        for name, task in speed_tasks(o, sample_ids(o, 8, length, others)).items()
    }
    rates = take_turns(tasks, rounds)
    named, found = distinct_names([o.run.folder for o in loaded]), []
    with work(len(loaded), "runs"):
        for i, o in enumerate(loaded):
            own: dict[str, Rate] = {name: rate for (run, name), rate in rates.items() if run == i}
            found.append(replace(run_metrics(o, others, own), name=named[i]))
            advance("runs", note=named[i])
    return found


def _check_twins(loaded: Sequence[LoadedRun]) -> None:
    for o in loaded:
        if o.data is None or not o.data.config.tells_difficulty:
            raise ValueError(f"{o.run.name} was not trained on a corpus of known difficulty, which headroom needs")
    if "forced" not in loaded[-1].passes:
        raise ValueError(f"{loaded[-1].run.name} has no depth mechanism that could be forced")


def _machine(device: torch.device) -> PlainDict:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {"device": f"{device.type} ({name})", "threads": torch.get_num_threads(), "torch": torch.__version__}
