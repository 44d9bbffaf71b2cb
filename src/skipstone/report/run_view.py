"""`RunView`: what a report shows of one run, its figures and files, read once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from skipstone.core.strict import PlainMapping
from skipstone.measure.token_trace import ModelView, TokenTrace
from skipstone.report.palette import Style, style
from skipstone.runs import Run


@dataclass(frozen=True, kw_only=True)
class RunView:
    """The figures of a run that a report shows, with its name and style on the page.

    name: its name on the page. style: colour and dash of its curves. config: the recipe. environment: versions and
    machine. metrics: the log lines. result: the summary of training; empty if training is not finished. mechanisms: a
    description of the model's mechanisms as text. capacities: the largest share of a row's tokens that each mechanism
    is configured to keep, {block: {mechanism: share}}. trace: what the model decided for a few rows; None if the model
    could not be run. trouble: why the model could not be run, or "".
    """

    name: str
    style: Style
    config: PlainMapping
    environment: PlainMapping
    metrics: Sequence[PlainMapping]
    result: PlainMapping
    mechanisms: str
    capacities: Mapping[int, Mapping[str, float]]
    trace: TokenTrace | None
    trouble: str


def load_view(run: Run, name: str, index: int) -> RunView:
    """Load everything that a report shows of one run; what it has to measure is stored in the run's folder.

    run: the run. name: its name on the page. index: position on the page, which determines the style. If the model or
    the corpus is missing, only the pictures that need it are left out, and `trouble` says why.
    """
    mechanisms, trace, trouble = "", None, ""
    capacity: Mapping[int, Mapping[str, float]] = {}
    try:
        view = _kept(run)
        if view is None:
            from skipstone.measure.model_view import (
                configured_capacities,
                mechanisms_in_words,
                view_model,
            )  # loads torch

            model = run.load_model()
            mechanisms, capacity = mechanisms_in_words(model), configured_capacities(model)
            view = view_model(model, run.data(), run.config()["train"].get("routing") == "difficulty")
            run.keep_view(view.to_dict())
        mechanisms, capacity, trace = view.mechanisms, view.capacities, view.trace
        if not run.finished:
            mechanisms += "; its training is not finished"
    except (OSError, ValueError) as error:
        trouble = " ".join(str(error).split())
    return RunView(
        name=name,
        style=style(index),
        config=run.config(),
        environment=run.environment(),
        metrics=run.metrics(),
        result=run.result() if run.finished else {},
        mechanisms=mechanisms,
        capacities=capacity,
        trace=trace,
        trouble=trouble,
    )


def map_view(path: Path, index: int) -> RunView:
    """Read a file of `skipstone trace` as a `RunView` that has only the decisions on its text.

    path: path of the file. index: position on the page, which determines the style. Raises ValueError for any other
    file.
    """
    from skipstone.report.trace_table import read_trace

    trace = read_trace(path)
    return RunView(
        name=path.name,
        style=style(index),
        config={},
        environment={},
        metrics=(),
        result={},
        mechanisms=f"the first row of {path.name}; blocks {', '.join(map(str, sorted(trace.routed)))} are routed",
        capacities={},
        trace=trace,
        trouble="",
    )


def _kept(run: Run) -> ModelView | None:
    values = run.kept_view()
    return None if values is None else ModelView.from_dict(values)
