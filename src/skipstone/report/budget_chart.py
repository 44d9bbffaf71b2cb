"""A chart of loss against FLOP budget, from the files of `skipstone eval RUN --budget ... --json FILE`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from skipstone.core.plain_text import read_object
from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.report import charts
from skipstone.report.axes import Frame, bounds
from skipstone.report.charts import Series
from skipstone.report.drawn import Drawn
from skipstone.report.run_view import RunView
from skipstone.runs import Run

Points = Sequence[PlainMapping]  # `AtBudget` as plain values, the model as trained first
FRAME = Frame(width=460, height=300)


def read_budgets(files: Sequence[Path], runs: Sequence[Run], names: Sequence[str]) -> dict[str, Points]:
    """Read the losses at several FLOP budgets from files of `skipstone eval --budget --json`.

    files: the files to read. runs, names: the runs on the page and their names there, in the same order. Returns {name
    of a run: its points}; a point is a dict with `target` (the requested share of the dense FLOPs; None as trained),
    `realised` (the executed share), `flops_per_token` and `loss` (nats per token). Raises ValueError for a file without
    budgets, and for one whose run is not on the page or is there twice.
    """
    found: dict[str, Points] = {}
    for file in files:
        folder, points = _read(Path(file))
        shown = [name for run, name in zip(runs, names, strict=True) if run.name == folder]
        if len(shown) != 1 or shown[0] in found:
            what = "is not on this page" if not shown else "is on this page more than once"
            raise ValueError(f"{str(file)!r} is of run {folder!r}, which {what} (runs: {', '.join(names)})")
        found[shown[0]] = points
    return found


def _read(file: Path) -> tuple[str, Points]:
    try:
        values = read_object(file)
        run, points = str(values["run"]), list(values["budgets"])
        points = [_of_today(point) for point in points]
        assert all({"target", "realised", "flops_per_token", "loss"} <= set(point) for point in points)
    except (ValueError, KeyError, TypeError, AssertionError):
        points = []
    if not points:
        raise ValueError(f"{str(file)!r} has no budgets: `skipstone eval RUN --budget .5,.75 --json FILE` writes them")
    return run, points


def _of_today(point: PlainMapping) -> PlainDict:
    """Return the point under the current names; versions before 0.2 called the target `asked`."""
    return {"target" if key == "asked" else key: value for key, value in point.items()}


def curve(runs: Sequence[RunView], budgets: Mapping[str, Points]) -> Drawn | None:
    """Draw each run's loss over the executed share of the dense FLOPs; None if nothing was measured.

    runs: the runs on the page. budgets: {name of a run: its points}; a point is a dict with `realised` (share of the
    dense FLOPs) and `loss` (nats per token). Runs without points are left out.
    """
    series = [
        Series(
            label=run.name,
            points=sorted((float(p["realised"]), float(p["loss"])) for p in budgets[run.name]),
            style=run.style,
        )
        for run in runs
        if run.name in budgets
    ]
    if not series:
        return None
    points = [point for s in series for point in s.points]
    return charts.lines(
        series,
        "share of the dense FLOPs a token",
        "nats a token",
        "loss by budget",
        FRAME,
        bounds(x for x, _ in points),
        bounds(y for _, y in points),
    )


def table(runs: Sequence[RunView], budgets: Mapping[str, Points]) -> list[tuple[RunView, list[str]]]:
    """Return the rows of a table of measured budgets: pairs of a run and the row's cells.

    The cells are: budget, realised share of the dense FLOPs, FLOPs per token, loss. runs: the runs on the page.
    budgets: {name of a run: its points}; a point is a dict with `target` (the requested share of the dense FLOPs; None
    as trained), `realised` (the executed share), `flops_per_token` and `loss` (nats per token).
    """
    return [
        (
            run,
            [
                "as trained" if p["target"] is None else f"{p['target']:.1%}",
                f"{p['realised']:.1%}",
                f"{p['flops_per_token']:,.0f}",
                f"{p['loss']:.4f}",
            ],
        )
        for run in runs
        for p in budgets.get(run.name, [])
    ]
