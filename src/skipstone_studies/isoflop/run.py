"""`isoflop`: train the runs of an isoFLOP grid that are missing, and render its Markdown and HTML page."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.console import Console
from transformers import TrainerCallback

from skipstone.core.atomic_write import write_whole
from skipstone.core.sealed import read_sealed, sealed
from skipstone.core.strict import PlainDict, from_dict
from skipstone.evaluate.evaluation import COUNTED_BATCHES
from skipstone.evaluate.loaded_run import batches
from skipstone.evaluate.tables import rich_table
from skipstone.measure.flops import flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import PASSES
from skipstone.runs import Run
from skipstone.train.training import train
from skipstone_studies.isoflop import page
from skipstone_studies.isoflop.curves import FOLDER, GridRecords, collect, lookup, nearest_optimum
from skipstone_studies.isoflop.estimate import GridEstimate, step_times, step_times_at
from skipstone_studies.isoflop.grid import (
    CorpusFacts,
    Grid,
    GridCell,
    check_once,
    compact,
    read_corpus,
    read_corpus_if_cheap,
)
from skipstone_studies.isoflop.result import find
from skipstone_studies.isoflop.spec import GridSpec
from skipstone_studies.isoflop.table import COUNTED_ROWS
from skipstone_studies.measure import CoreUse, executed_training, watched
from skipstone_studies.session import Session
from skipstone_studies.study import Figures, RecipeDict, Study
from skipstone_studies.timing import training_speeds

EXECUTED = PASSES["executed"]
PLAN = "plan.json"  # the spec, kept beside the records


def isoflop(spec: GridSpec, *, out: Path, runs: Path, command: str) -> list[Path]:
    """Train all runs of an isoFLOP grid without a stored result, and return the paths of its Markdown and HTML files.

    Both are rendered again after every stage. spec: the grid. out: folder for these files and records (stored results
    of runs). runs: folder for run folders. command: the shell command, which is noted in records. Raises ValueError or
    FileNotFoundError before anything is trained if a run is impossible, and ValueError at the end if runs have failed.
    """
    facts = read_corpus(spec.data)
    grid = Grid(with_vocabulary(spec, facts))
    grid.everything()
    check_once(grid, facts)
    write_whole(out / grid.spec.name / PLAN, json.dumps(sealed(grid.spec.to_dict()), indent=1) + "\n")
    stages = Stages(grid=grid, facts=facts, out=out, runs=runs, command=command)
    try:
        stages.run()
    except (KeyboardInterrupt, SystemExit):
        stages.say("stopped; repeat the command to continue")
        _render_if_any(out, grid.spec.name)
        raise
    written = _render_if_any(out, grid.spec.name)
    if stages.failures:
        raise ValueError(f"{len(stages.failures)} runs failed: {'; '.join(stages.failures)}")
    return written


@dataclass(kw_only=True)
class Stages:
    """The stages in which an isoFLOP grid is run; finished runs are recorded, and interrupted ones resumed.

    An arm is a compared recipe. The stages are: trying learning rates, training the grid itself, measuring training
    speeds with the arms of a size in turns, and training further seeds at the optima. grid: all runs. facts: the corpus
    with its rows. out: folder for records (stored results of runs). runs: folder for run folders. command: the shell
    command, which is noted in records. console: for messages. failures: one message for each failed run. use: use of
    processor cores by run folder, for runs trained in this process.
    """

    grid: Grid
    facts: CorpusFacts
    out: Path
    runs: Path
    command: str
    console: Console = field(default_factory=lambda: Console(stderr=True))
    failures: list[str] = field(default_factory=list)
    use: dict[Path, CoreUse] = field(default_factory=dict)  # by run folder, for runs trained in this process

    def say(self, text: str) -> None:
        """Print a message after the name of the grid.

        text: the message.
        """
        self.console.print(f"[dim]{self.grid.spec.name}[/dim]  {text}", highlight=False, soft_wrap=True)

    def run(self) -> None:
        """Run all stages of the grid, one after the other."""
        grid, spec, known = self.grid, self.grid.spec, lookup(self.out, self.grid.spec.name)
        self.stage("rates", [cell for arm in spec.arms for cell in grid.sweep(arm)], [spec.seed])
        chosen = collect(grid, known).chosen
        self.say(f"learning rates: {', '.join(f'{arm} {rate:g}' for arm, rate in chosen.items())}")
        cells = {arm: grid.cells(arm, rate) for arm, rate in chosen.items()}
        self.stage("grid", [cell for row in zip(*cells.values(), strict=True) for cell in row], [spec.seed])
        for size, arms in _by_size(grid, cells).items():  # one budget suffices: a step does not depend on it
            recorded = [cell for cell in arms.values() if known(cell, spec.seed) is not None]
            self.stage(f"steps at {size}", recorded, [spec.seed], timed=True)
        best = [nearest_optimum(points) for points in collect(grid, known).curves.values()]
        self.stage("seeds", best, grid.other_seeds)

    def stage(self, name: str, cells: Sequence[GridCell], seeds: Sequence[int], timed: bool = False) -> None:
        """Run everything in `cells` with each of `seeds`, unless its result is stored, then render the pages.

        name: the name of the stage, for messages. cells: the runs, without seeds. timed: whether to measure the
        training speeds of all cells in turns as well.
        """
        if not cells or not seeds:
            return
        recipes, by_label = {cell.label: cell.recipe for cell in cells}, {cell.label: cell for cell in cells}
        study = Study(
            name=self.grid.spec.name,
            purpose="equal training FLOPs",
            arms=lambda scale: recipes,
            columns=(),
            seeds={FOLDER: seeds},
            make=self._train,
            measure=lambda folder: self._figures(by_label[folder.name.rpartition("-seed")[0]], folder),
            measure_together=_speeds if timed else None,
        )
        session = Session(
            study=study,
            scale=FOLDER,
            arms=recipes,
            runs=self.runs,
            out=self.out,
            console=self.console,
            made_by=self.command,
        )
        self.say(f"{name}: {session.finished(list(seeds))} of {len(recipes) * len(seeds)} runs are recorded")
        session.run(list(seeds))
        self.failures += session.failures
        _render_if_any(self.out, self.grid.spec.name)

    def _train(self, recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback]) -> None:
        """Train one run of the grid on the corpus that all runs share; each seed has its own order of rows.

        recipe: its recipe. folder: the run folder. resume: whether to continue an interrupted run. callbacks: further
        callbacks of the trainer.
        """
        data = self.facts.data
        assert data is not None
        assert data.train is not None
        changed: PlainDict = {"seed": recipe["data"]["seed"]}
        rows = replace(data, config=replace(data.config, **changed), train=replace(data.train, **changed))
        shown = self.console.is_terminal
        with watched() as self.use[folder]:
            train(recipe, out=folder, resume=resume, progress=shown, data=rows, callbacks=callbacks)

    def _figures(self, cell: GridCell, folder: Path) -> Figures:
        return figures(cell, folder, self.facts, self.use.get(folder, CoreUse()))


def _speeds(runs: Mapping[str, Path]) -> dict[str, Figures]:
    return {arm: {"training_speed": speed} for arm, speed in training_speeds(runs).items()}


def _by_size(grid: Grid, cells: Mapping[str, list[GridCell]]) -> dict[str, dict[str, GridCell]]:
    """Return the runs of a grid at its smallest budget, {size: {arm: cell}}. cells: all of them, by arm."""
    found: dict[str, dict[str, GridCell]] = {}
    for arm, row in cells.items():
        for cell in row:
            if cell.budget == grid.budgets[0]:
                found.setdefault(str(cell.size), {})[arm] = cell
    return found


def with_vocabulary(spec: GridSpec, facts: CorpusFacts) -> GridSpec:
    """Return the specification with the corpus's vocabulary size in its recipe, so that costs follow from it alone.

    A vocabulary size that the recipe sets is kept. spec: the specification. facts: what is known of the corpus. Raises
    ValueError if the corpus was not read and the recipe sets no vocabulary size.
    """
    model: PlainDict = dict(spec.recipe.get("model") or {})
    if facts.vocab_size is None and "vocab_size" not in model:
        raise ValueError(f"{facts.trouble}; set model.vocab_size, on which the cost depends")
    values = {**spec.to_dict(), "recipe": {**spec.recipe, "model": {"vocab_size": facts.vocab_size, **model}}}
    return from_dict(GridSpec, values)


def estimate(spec: GridSpec, flops_per_second: float | None = None) -> None:
    """Print FLOPs and time of every run of an isoFLOP grid; train nothing.

    spec: the grid. flops_per_second: training FLOPs per second of another machine; None means that this machine is
    timed. Raises ValueError for impossible runs.
    """
    facts = read_corpus_if_cheap(spec.data)
    grid = Grid(with_vocabulary(spec, facts))
    grid.everything()
    check_once(grid, facts)
    if flops_per_second is None:
        shown = GridEstimate(grid=grid, facts=facts, step_times=step_times(grid))
    else:
        source = f"training and validation at {compact(flops_per_second)} FLOPs a second"
        shown = GridEstimate(grid=grid, facts=facts, step_times=step_times_at(grid, flops_per_second), source=source)
    Console().print(rich_table(shown.sections()))


def render(out: Path, name: str) -> list[Path]:
    """Write OUT/NAME.md and OUT/NAME.html from the stored results of an isoFLOP grid; return their paths.

    out: the folder. name: the name of the grid. Raises ValueError if there are no results.
    """
    collected = load(out, name)
    if not collected.records:
        raise ValueError(f"no records of the grid of {name!r} in {str(out)!r}: nothing to render")
    findings = find(collected)
    written = {out / f"{name}.md": page.as_markdown(findings), out / f"{name}.html": page.as_html(findings)}
    for path, text in written.items():
        write_whole(path, text)
    return list(written)


def load(out: Path, name: str) -> GridRecords:
    """Load the records (stored results of runs) of the isoFLOP grid `name` from the folder `out`.

    Raises FileNotFoundError if no isoFLOP study of that name was begun there, and ValueError if its plan.json is
    damaged.
    """
    path = out / name / PLAN
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist: no isoFLOP study {name!r} was started there")
    try:
        spec = from_dict(GridSpec, read_sealed(path))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
    return collect(Grid(spec), lookup(out, name))


def _render_if_any(out: Path, name: str) -> list[Path]:
    """Render after a stage, unless there are no records yet."""
    return render(out, name) if load(out, name).records else []


def figures(cell: GridCell, folder: Path, facts: CorpusFacts, clock: CoreUse) -> PlainDict:
    """Return the figures of a finished run of an isoFLOP grid, for its record (stored result).

    cell: the run without its seed. folder: the run folder. facts: the corpus with its rows. clock: use of processor
    cores during the training. Keys: `cell`, arm (compared recipe), budget, size, rate, steps and parameters; `loss` on
    the whole validation set in the pass that really skips, in nats per token, also as `bits_per_byte`; `predictions`,
    the number of tokens that this loss is the mean of; `capacity`, the share of tokens kept, {block: {mechanism:
    share}}; `forward_flops`, counted per token, `forward_flops_needed`, without the padding of rows that keep fewer
    tokens than others, and `forward_flops_dense`, without mechanisms; `training_flops`, as `planned` and as `executed`
    with the capacities that were logged; `training`, the summary of the training; `sharing`, the fields of `clock`;
    `corpus`, its tokens and hash, and as `seen` how many times it was read.
    """
    assert facts.data is not None
    run = Run(folder)
    model = run.load_model()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    data, device, train = facts.data, model.device, run.config()["train"]
    rows = train["eval_batch_size"] or train["batch_size"]
    found = measure_loss(model, EXECUTED, batches(data, rows, device), activations=False)
    counted = flop_check(model, EXECUTED, batches(data, COUNTED_ROWS, device, rows=COUNTED_BATCHES * COUNTED_ROWS))
    result = run.result()
    return {
        "cell": {
            "arm": cell.arm,
            "budget": cell.budget,
            "size": str(cell.size),
            "rate": cell.rate,
            "steps": cell.steps,
            "parameters": cell.shape.parameters,
        },
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte(data.validation_bytes),
        "predictions": found.predictions,
        "capacity": {str(i): layer for i, layer in enumerate(_capacities(found.summaries.layers())) if layer},
        "forward_flops": counted.counted,
        "forward_flops_needed": counted.needed,
        "forward_flops_dense": counted.dense,
        "training_flops": {"planned": cell.flops, "executed": executed_training(model, run, cell.steps)},
        "training": result,
        "sharing": {"busy": clock.busy, "load": clock.load},
        "corpus": {**facts.to_dict(), "seen": None if facts.tokens is None else result["tokens"] / facts.tokens},
    }


def _capacities(layers: list[dict[str, PlainDict]]) -> list[dict[str, float]]:
    return [{name: found["capacity"] for name, found in layer.items() if "capacity" in found} for layer in layers]
