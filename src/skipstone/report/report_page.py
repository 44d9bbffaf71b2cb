"""The sections of a report: tables of strings and pictures as SVG, built from runs for the template."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import yaml

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.report import allocation_charts, budget_chart, charts, frontier_chart, mixes, token_picture
from skipstone.report.axes import Frame, bounds
from skipstone.report.charts import Bar, Series
from skipstone.report.drawn import Drawn
from skipstone.report.palette import SERIES
from skipstone.report.run_view import RunView

FRAME, LOW = Frame(), Frame(height=190)
PICTURED = 84  # tokens across the tokens x layers picture: as many as stay readable on paper
EXPERT_NAMES = ("most chosen expert", "least chosen expert", "no-ops")
ABSENT = "–"
Pieces = Sequence[tuple[str, float]]  # generated text and the share of the compute that each piece took

FIGURES: tuple[tuple[str, Callable[[RunView], float | None], str], ...] = (
    ("parameters", lambda run: run.result.get("parameters"), ",d"),
    ("steps", lambda run: run.result.get("steps"), ",d"),
    ("tokens", lambda run: run.result.get("tokens"), ",d"),
    ("tokens/s", lambda run: run.result.get("tokens_per_second"), ",.0f"),
    ("training loss", lambda run: _last(run, "train", "token_loss"), ".4f"),
    ("oracle loss", lambda run: (run.result.get("validation") or {}).get("oracle_loss"), ".4f"),
    ("causal loss", lambda run: (run.result.get("validation") or {}).get("causal_loss"), ".4f"),
    ("blocks computed", lambda run: None if run.trace is None else run.trace.depth, ".1%"),
)


def context(
    runs: Sequence[RunView],
    samples: Mapping[str, Pieces],
    measured: Mapping[str, budget_chart.Points],
    maps: Sequence[RunView] = (),
) -> PlainDict:
    """Return the variables of the template `page.html`, by name.

    runs: the runs shown on the page. samples: generated text by name of the run, as pairs of a piece of text and the
    share of the compute that it took. measured: {name of a run: its losses at FLOP budgets}; each is a dict with
    `target` (the requested share of the dense FLOPs; None as trained), `realised` (the executed share),
    `flops_per_token` and `loss` (nats per token). maps: decisions on the texts of files of `skipstone trace`, which are
    shown beside the decisions of the runs.
    """
    return {
        "runs": runs,
        "figures": [title for title, _, _ in FIGURES],
        "rows": [(run, [_figure(get(run), form) for _, get, form in FIGURES]) for run in runs],
        "losses": _losses(runs),
        "frontier": frontier_chart.chart(runs, measured),
        "budgets": budget_chart.curve(runs, measured),
        "budget_rows": budget_chart.table(runs, measured),
        "routed": [_routed(run) for run in (*runs, *maps) if run.trace is not None and run.trace.routed],
        "allocations": [card for run in (*runs, *maps) if (card := allocation_charts.card(run)) is not None],
        "training": _training(runs),
        "mixes": [mixes.card(run) for run in runs if run.trace is not None and run.trace.activations],
        "activation_names": list(zip(next(filter(None, map(mixes.names_of, runs)), ()), SERIES, strict=False)),
        "experts": [(run, _experts(run)) for run in runs if run.trace is not None and run.trace.experts],
        "expert_names": list(zip(EXPERT_NAMES, SERIES, strict=False)),
        "samples": [(run, token_picture.coloured(samples[run.name])) for run in runs if run.name in samples],
        "troubles": _troubles(runs),
        "configurations": [(run, _yaml(run.config), _yaml(run.environment)) for run in runs],
    }


def _troubles(runs: Sequence[RunView]) -> dict[str, list[str]]:
    """Return the reasons why pictures are missing, with the names of the runs that each applies to."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.trouble:
            found.setdefault(run.trouble, []).append(run.name)
    return found


def _figure(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(int(value) if form.endswith("d") else value, form)


def _yaml(values: PlainMapping) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _curve(run: RunView, split: str, key: str) -> list[tuple[float, float]]:
    lines = (line for line in run.metrics if line.get("split") == split and line.get(key) is not None)
    return [(float(line["step"]), float(line[key])) for line in lines]


def _last(run: RunView, split: str, key: str) -> float | None:
    return next((y for _, y in reversed(_curve(run, split, key))), None)


def _losses(runs: Sequence[RunView]) -> list[tuple[str, Drawn]]:
    """Draw training and validation loss on the same ranges; return pairs of title and chart, without empty ones."""
    panels = {
        "training": ("train", "token_loss"),
        "validation, causal decisions": ("validation", "causal_loss"),
        "validation, oracle decisions": ("validation", "oracle_loss"),
    }
    curves = {title: [(run, _curve(run, *where)) for run in runs] for title, where in panels.items()}
    points = [point for panel in curves.values() for _, points in panel for point in points]
    x_range, y_range = bounds((x for x, _ in points), 0), bounds(y for _, y in points)
    drawn = []
    for title, panel in curves.items():
        if any(points for _, points in panel):
            series = [Series(label=run.name, points=points, style=run.style) for run, points in panel]
            picture = charts.lines(series, "step", "nats a token", f"loss in {title}", FRAME, x_range, y_range)
            drawn.append((title, picture))
    return drawn


COURSES = {"learning rate": "learning_rate", "tokens/s": "tokens_per_second", "tau": "tau"}


def _training(runs: Sequence[RunView]) -> list[tuple[str, Drawn]]:
    """Draw the other figures that training logged at each step; return pairs of title and chart.

    Each figure has a range of its own; figures that no run has are left out.
    """
    drawn = []
    for title, key in COURSES.items():
        series = [Series(label=run.name, points=_curve(run, "train", key), style=run.style) for run in runs]
        points = [point for s in series for point in s.points]
        if points:
            x_range, y_range = bounds((x for x, _ in points), 0), bounds([0.0, *(y for _, y in points)])
            drawn.append((title, charts.lines(series, "step", "", f"{title} in training", LOW, x_range, y_range)))
    return drawn


def _routed(run: RunView) -> PlainDict:
    """Return the template's variables for a run with depth mechanisms: token picture, capacities, coloured text."""
    assert run.trace is not None
    bars = [
        Bar(layer=layer, name=name, value=share, mark=run.capacities.get(layer, {}).get(name))
        for layer, shares in run.trace.capacity.items()
        for name, share in shares.items()
    ]
    count = len(run.trace.weight_LT)
    title = f"{run.name}: share of tokens kept by layer"
    return {
        "run": run,
        "picture": token_picture.picture(
            run.trace, PICTURED, f"{run.name}: weight of each layer's update for each token"
        ),
        "capacity": charts.bars(bars, layers=count, y_title="tokens kept", title=title, frame=FRAME),
        "names": list(zip(dict.fromkeys(bar.name for bar in bars), SERIES, strict=False)),
        "marked": any(bar.mark is not None for bar in bars),
        "text": token_picture.coloured(
            list(zip(run.trace.tokens, run.trace.depth_T, strict=True)), "{:.0%} of the blocks"
        ),
        "strongest": f"{run.trace.strongest:.2g}",
        "negative": any(w < 0 for layer in run.trace.routed for w in run.trace.weight_LT[layer]),
    }


def _experts(run: RunView) -> Drawn:
    assert run.trace is not None
    bars = [
        Bar(layer=layer, name=name, value=shares[name])
        for layer, shares in run.trace.experts.items()
        for name in EXPERT_NAMES
    ]
    title, count = f"{run.name}: share of all choices by layer", len(run.trace.weight_LT)
    return charts.bars(bars, layers=count, y_title="share of choices", title=title, frame=FRAME)
