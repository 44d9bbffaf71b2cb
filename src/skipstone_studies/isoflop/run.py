"""`isoflop`: from a recipe and a grid to a table and a page, going on with whatever is there already."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from skipstone.core.atomic_write import write_whole
from skipstone.core.strict import from_dict
from skipstone.evaluate.tables import rich_table
from skipstone_studies.isoflop import page, table
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
from skipstone_studies.isoflop.session import GridSession
from skipstone_studies.isoflop.spec import GridSpec
from skipstone_studies.study import Study

PLAN = "plan.json"  # the spec that the table and the page were last rendered for, beside the records


def isoflop(spec: GridSpec, *, out: Path, runs: Path, command: str) -> list[Path]:
    """Train what is not recorded yet, and render after every stage. Returns the table's and the page's path.

    Raises ValueError or FileNotFoundError, one line, before anything is trained when a run cannot be; ValueError at the
    end if runs have failed, when everything else is done.
    """
    facts = read_corpus(spec.data)
    grid = Grid(with_vocabulary(spec, facts))
    grid.everything()
    check_once(grid, facts)
    session = _session(grid, facts, out, runs, command)
    try:
        _stages(session)
    except (KeyboardInterrupt, SystemExit):
        session.say("stopped; the same command goes on from here")
        session.after()
        raise
    written = _render_if_any(out, grid.spec.name)
    if session.failures:
        raise ValueError(f"{len(session.failures)} runs failed: {'; '.join(session.failures)}")
    return written


def _session(grid: Grid, facts: CorpusFacts, out: Path, runs: Path, command: str) -> GridSession:
    spec = grid.spec
    write_whole(out / spec.name / PLAN, json.dumps(spec.to_dict(), indent=1) + "\n")
    study = Study(
        name=spec.name, purpose="equal training FLOPs", arms=lambda scale: {}, columns=(), seeds={FOLDER: (spec.seed,)}
    )
    planned = GridEstimate(grid=grid, facts=facts, step_times={}).parts()
    return GridSession(
        study=study,
        scale=FOLDER,
        arms={},
        runs=runs,
        out=out,
        console=Console(stderr=True),
        grid=grid,
        facts=facts,
        line=command,
        left_flops=sum(cell.flops for cells in planned.values() for cell in cells),
        after=lambda: _render_if_any(out, spec.name),
    )


def _stages(session: GridSession) -> None:
    """Learning rates, the grid, steps timed in turns, further seeds at the optima."""
    grid, spec = session.grid, session.grid.spec
    known = lookup(session.out, spec.name)
    session.run_all("rates", [(cell, spec.seed) for arm in spec.arms for cell in grid.sweep(arm)])
    chosen = collect(grid, known).chosen
    session.say(f"learning rates: {', '.join(f'{arm} {rate:g}' for arm, rate in chosen.items())}")
    cells = {arm: grid.cells(arm, rate) for arm, rate in chosen.items()}
    session.run_all("grid", [(cell, spec.seed) for row in zip(*cells.values(), strict=True) for cell in row])
    session.time_in_turns(_by_size(grid, cells), spec.seed)
    best = [nearest_optimum(points) for points in collect(grid, known).curves.values()]
    session.run_all("seeds", [(cell, seed) for seed in grid.other_seeds for cell in best])


def _by_size(grid: Grid, cells: Mapping[str, list[GridCell]]) -> dict[str, dict[str, GridCell]]:
    """At the smallest budget."""
    found: dict[str, dict[str, GridCell]] = {}
    for arm, row in cells.items():
        for cell in row:
            if cell.budget == grid.budgets[0]:
                found.setdefault(str(cell.size), {})[arm] = cell
    return found


def with_vocabulary(spec: GridSpec, facts: CorpusFacts) -> GridSpec:
    """The spec with the corpus's vocabulary in its recipe, so that costs follow from the spec alone."""
    model: dict[str, Any] = dict(spec.recipe.get("model") or {})
    if facts.vocab_size is None and "vocab_size" not in model:
        raise ValueError(f"{facts.trouble}; set model.vocab_size, on which the cost depends")
    values = {**spec.to_dict(), "recipe": {**spec.recipe, "model": {"vocab_size": facts.vocab_size, **model}}}
    return from_dict(GridSpec, values)


def estimate(spec: GridSpec, flops_per_second: float | None = None) -> None:
    """Print every run with its FLOPs and its time, on this machine or at so many FLOPs a second; train nothing.

    Raises ValueError, one line, for runs that cannot be.
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
    """Write OUT/NAME.md and OUT/NAME.html from the records alone. Raises ValueError where there are none."""
    collected = load(out, name)
    if not collected.records:
        raise ValueError(f"no records of the grid of {name!r} in {str(out)!r}: nothing to render")
    findings = find(collected)
    written = {out / f"{name}.md": table.page(findings), out / f"{name}.html": page.render(findings)}
    for path, text in written.items():
        write_whole(path, text)
    return list(written)


def load(out: Path, name: str) -> GridRecords:
    """Raises FileNotFoundError where no isoFLOP study of that name was begun."""
    path = out / name / PLAN
    if not path.is_file():
        raise FileNotFoundError(f"{str(path)!r} does not exist: no isoFLOP study {name!r} was begun there")
    spec = from_dict(GridSpec, json.loads(path.read_text(encoding="utf-8")))
    return collect(Grid(spec), lookup(out, name))


def _render_if_any(out: Path, name: str) -> list[Path]:
    """After a stage; before the grid's first record there is nothing to show."""
    return render(out, name) if load(out, name).records else []
