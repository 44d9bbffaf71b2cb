"""Estimate FLOPs and hours of every run of an isoFLOP grid before anything is trained.

Step times come from a few passes over random tokens. Forward and backward are timed per row and the optimizer per step,
so that large batches need not be run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from skipstone.core.records import Records
from skipstone.evaluate.tables import Section, percent
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.report.axes import short
from skipstone.train.recipe import Recipe
from skipstone.train.setup import build_model, model_config
from skipstone_studies.isoflop.grid import (
    CorpusFacts,
    Grid,
    GridCell,
    ModelShape,
    compact,
    corpus_share,
    tokens_per_step,
)
from skipstone_studies.pace import duration

ROUNDS = 3  # timed rounds, after one that warms up and sets the thresholds
ROW_LIMIT, PASS_LIMIT = 1e12, 1e11  # training FLOPs of the largest row that is timed, and of the largest pass
PARAMETER_LIMIT = 250_000_000  # weights, gradients and both moments take 4 GB


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """The times of training one model size, in seconds.

    row: forward and backward pass of one row. optimizer: one optimizer step. measured: False if extrapolated from a
    smaller size of the same arm (compared recipe).
    """

    row: float
    optimizer: float
    measured: bool

    def step(self, batch: int) -> float:
        """Return the seconds of a training step with `batch` rows."""
        return batch * self.row + self.optimizer


def step_times(grid: Grid) -> dict[ModelShape, StepTime]:
    """Time training steps of every model of an isoFLOP grid on this machine.

    A model that is too large to be timed is assumed to reach the FLOPs per second of the largest timed model of the
    same recipe. grid: the runs. Returns the times by model. Raises ValueError if the smallest size of a recipe is
    already too large.
    """
    found: dict[ModelShape, StepTime] = {}
    batch, device = grid.base.train.batch_size, _device(grid.base)
    for arm in grid.spec.arms:
        last: ModelShape | None = None
        for size in grid.sizes:
            shape = grid.shape(arm, size)
            if shape.step_flops / batch <= ROW_LIMIT and shape.parameters <= PARAMETER_LIMIT:
                found[shape], last = _timed(grid.base, shape, device), shape
            elif last is None:
                raise ValueError(f"{arm} {size} is too large to be timed here; add a smaller size for the estimate")
            else:
                scale = shape.step_flops / last.step_flops
                before = found[last]
                found[shape] = StepTime(row=before.row * scale, optimizer=before.optimizer * scale, measured=False)
    return found


def step_times_at(grid: Grid, flops_per_second: float) -> dict[ModelShape, StepTime]:
    """Return the step times of every model of a grid on a machine that reaches `flops_per_second` in training.

    grid: the runs. flops_per_second: training FLOPs per second. Raises ValueError unless it is above 0.
    """
    if not 0 < flops_per_second < float("inf"):
        raise ValueError(f"FLOPs per second must be above 0, got {flops_per_second}")
    shapes = [grid.shape(arm, size) for arm in grid.spec.arms for size in grid.sizes]
    rows = grid.base.train.batch_size
    return {s: StepTime(row=s.step_flops / rows / flops_per_second, optimizer=0.0, measured=True) for s in shapes}


def _device(base: Recipe) -> torch.device:
    accelerated = base.train.device == "auto" and torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() or torch.device("cpu") if accelerated else torch.device("cpu")


def _timed(base: Recipe, shape: ModelShape, device: torch.device) -> StepTime:
    train, context = base.train, base.data.context
    config = model_config({"vocab_size": 256, **shape.model}, context, {})
    model = build_model(config, train).to(device).train()  # type: ignore[arg-type]
    rows = max(
        1, min(train.batch_size // train.gradient_accumulation, int(PASS_LIMIT * train.batch_size / shape.step_flops))
    )
    ids_BT = torch.randint(0, config.vocab_size, (rows, context), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    passes, steps = [], []
    for turn in range(ROUNDS + 1):
        begin = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            out = model(input_ids=ids_BT, labels=ids_BT, output_records=True)
        _backward(out.loss)
        middle = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        if turn == 0:
            _settle(model, out.records)
        else:
            passes.append((middle - begin) / rows)
            steps.append(_now(device) - middle)
    return StepTime(row=statistics.median(passes), optimizer=statistics.median(steps), measured=True)


def _backward(loss: Tensor | None) -> None:
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _settle(model: SkipstoneForCausalLM, records: Sequence[Records]) -> None:
    """Set the routing thresholds that follow the scores to those of one pass, so that blocks keep their capacity.

    Their initial values would keep far more, and steps would be timed too slow. records: decisions of the pass, a dict
    by mechanism name for each block.
    """
    for mechanism in model.routing_modules():
        record = records[mechanism.placement.layer].get(mechanism.placement.name)
        mechanism.advance(0.0, None if record is None else mechanism.statistics(record))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


FORWARD = 1 / 3  # validation time of a row as a share of its training time


@dataclass(frozen=True, kw_only=True)
class GridEstimate:
    """The estimated FLOPs and hours of all runs of an isoFLOP grid.

    grid: the runs. facts: what is known of the corpus. step_times: the seconds of a training step, by model. source:
    how these times were found, in words.
    """

    grid: Grid
    facts: CorpusFacts
    step_times: Mapping[ModelShape, StepTime]
    source: str = "from a few training steps on random tokens on this machine, at its present load"

    def seconds(self, cell: GridCell) -> float:
        """Return the estimated seconds of training and validation of the run `cell`."""
        pace, batch = self.step_times[cell.shape], self.grid.base.train.batch_size
        rows = 0 if self.facts.data is None else len(self.facts.data.validation)
        return cell.steps * pace.step(batch) + FORWARD * rows * pace.row

    def sections(self) -> list[Section]:
        """Return two tables of FLOPs and time: one with every run of the grid, and one with sums over all planned runs.

        The rows of the second are the purposes of these runs (the keys of `parts`) and "all".
        """
        return [self._runs(), self._total()]

    def _runs(self) -> Section:
        notes = [] if not self.facts.trouble else [f"{self.facts.trouble}, so shares of the corpus are unknown."]
        if any(not pace.measured for pace in self.step_times.values()):
            notes.append(
                "Times with ~ were not measured; they assume the FLOPs per second of the arm's largest timed size."
            )
        return Section(
            title=f"{self.grid.spec.name}: the runs of the grid",
            columns=["budget", "size", "arm", "params", "steps", "tokens", "corpus", "FLOPs", "time"],
            rows=[self._row(cell) for cell in self.grid.everything()],
            notes=notes,
        )

    def _row(self, cell: GridCell) -> list[str]:
        mark = "" if self.step_times[cell.shape].measured else "~"
        return [
            compact(cell.budget),
            str(cell.size),
            cell.arm,
            short(cell.shape.parameters),
            f"{cell.steps:,}" if cell.steps < 1e5 else short(cell.steps),
            short(cell.steps * tokens_per_step(self.grid)),
            percent(corpus_share(self.grid, cell, self.facts)),
            compact(float(f"{cell.flops:.3g}")),
            mark + duration(self.seconds(cell)),
        ]

    def parts(self) -> dict[str, list[GridCell]]:
        """Return the runs that are estimated, grouped by purpose: {purpose in words: runs without their seeds}.

        The purposes are learning rates but the first (smallest budget, middle size), the grid itself at the first rate,
        and further seeds at the optima. Which sizes these are is not known in advance, so the middle size is assumed.
        """
        grid, arms = self.grid, self.grid.spec.arms
        middle = [grid.cell(arm, budget, grid.middle, grid.spec.rates[0]) for arm in arms for budget in grid.budgets]
        return {
            "learning rates besides the grid's own": [cell for arm in arms for cell in grid.sweep(arm)[1:]],
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

    def _sum(self, cells: list[GridCell]) -> list[str]:
        return [
            str(len(cells)),
            compact(float(f"{sum(c.flops for c in cells):.3g}")),
            duration(sum(map(self.seconds, cells))),
        ]
