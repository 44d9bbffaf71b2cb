"""From runs to what the template shows: tables of strings, pictures as SVG."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import yaml
from markupsafe import Markup

from skipstone.report import budgets, charts, layers, mixes
from skipstone.report.axes import Frame, bounds
from skipstone.report.charts import Bar, Series
from skipstone.report.palette import SERIES
from skipstone.report.shown import Shown

FRAME, SMALL = Frame(), Frame(width=250, height=180)
PICTURED = 84  # tokens across the tokens x layers picture: as many as stay readable on paper
EXPERT_NAMES = ("most chosen expert", "least chosen expert", "no-ops")
ABSENT = "–"
Pieces = Sequence[tuple[str, float]]  # generated text and the share of the compute that each piece took

FIGURES: tuple[tuple[str, Callable[[Shown], float | None], str], ...] = (
    ("parameters", lambda run: run.result.get("parameters"), ",d"),
    ("steps", lambda run: run.result.get("steps"), ",d"),
    ("tokens", lambda run: run.result.get("tokens"), ",d"),
    ("tokens/s", lambda run: run.result.get("tokens_per_second"), ",.0f"),
    ("training loss", lambda run: _last(run, "train", "token_loss"), ".4f"),
    ("oracle loss", lambda run: (run.result.get("validation") or {}).get("oracle_loss"), ".4f"),
    ("causal loss", lambda run: (run.result.get("validation") or {}).get("causal_loss"), ".4f"),
    ("blocks computed", lambda run: None if run.anatomy is None else run.anatomy.depth, ".1%"),
)


def context(
    runs: Sequence[Shown], samples: Mapping[str, Pieces], measured: Mapping[str, budgets.Points]
) -> dict[str, Any]:
    """The variables of `templates/page.html`. samples: generated text, measured: budgets, both by the runs' names."""
    return {
        "runs": runs,
        "figures": [title for title, _, _ in FIGURES],
        "rows": [(run, [_figure(get(run), form) for _, get, form in FIGURES]) for run in runs],
        "losses": _losses(runs),
        "budgets": budgets.curve(runs, measured),
        "budget_rows": budgets.table(runs, measured),
        "routed": [_routed(run) for run in runs if run.anatomy is not None and run.anatomy.routed],
        "training": _training(runs),
        "mixes": [mixes.card(run) for run in runs if run.anatomy is not None and run.anatomy.mixing],
        "activation_names": list(zip(mixes.ACTIVATIONS, SERIES, strict=False)),
        "experts": [(run, _experts(run)) for run in runs if run.anatomy is not None and run.anatomy.experts],
        "expert_names": list(zip(EXPERT_NAMES, SERIES, strict=False)),
        "samples": [(run, layers.coloured(samples[run.name])) for run in runs if run.name in samples],
        "troubles": _troubles(runs),
        "configurations": [(run, _yaml(run.config), _yaml(run.environment)) for run in runs],
    }


def _troubles(runs: Sequence[Shown]) -> dict[str, list[str]]:
    """Why pictures are missing, with the names of the runs it is true of."""
    found: dict[str, list[str]] = {}
    for run in runs:
        if run.trouble:
            found.setdefault(run.trouble, []).append(run.name)
    return found


def _figure(value: float | None, form: str) -> str:
    return ABSENT if value is None else format(int(value) if form.endswith("d") else value, form)


def _yaml(values: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True)


def _curve(run: Shown, split: str, key: str) -> list[tuple[float, float]]:
    lines = (line for line in run.metrics if line.get("split") == split and line.get(key) is not None)
    return [(float(line["step"]), float(line[key])) for line in lines]


def _last(run: Shown, split: str, key: str) -> float | None:
    return next((y for _, y in reversed(_curve(run, split, key))), None)


def _losses(runs: Sequence[Shown]) -> list[tuple[str, Markup]]:
    """Training and validation on the same ranges, so that they can be read across. Empty panels are left out."""
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
            series = [Series(label=run.name, points=points, look=run.look) for run, points in panel]
            picture = charts.lines(series, "step", "nats a token", f"loss in {title}", FRAME, x_range, y_range)
            drawn.append((title, picture))
    return drawn


COURSES = {"learning rate": "learning_rate", "tokens/s": "tokens_per_second", "tau": "tau"}


def _training(runs: Sequence[Shown]) -> list[tuple[str, Markup]]:
    """What else was logged at every step, each on ranges of its own; what no run has is left out."""
    drawn = []
    for title, key in COURSES.items():
        series = [Series(label=run.name, points=_curve(run, "train", key), look=run.look) for run in runs]
        points = [point for s in series for point in s.points]
        if points:
            x_range, y_range = bounds((x for x, _ in points), 0), bounds([0.0, *(y for _, y in points)])
            drawn.append((title, charts.lines(series, "step", "", f"{title} in training", SMALL, x_range, y_range)))
    return drawn


def _routed(run: Shown) -> dict[str, Any]:
    """The card of a run that skips: the picture, the capacities, the text."""
    assert run.anatomy is not None
    bars = [
        Bar(layer=layer, name=name, value=share, mark=run.set_capacity.get(layer, {}).get(name))
        for layer, shares in run.anatomy.capacity.items()
        for name, share in shares.items()
    ]
    count = len(run.anatomy.weight_LT)
    title = f"{run.name}: share of tokens kept by layer"
    return {
        "run": run,
        "picture": layers.picture(run.anatomy, PICTURED, f"{run.name}: weight of each layer's update for each token"),
        "capacity": charts.bars(bars, layers=count, y_title="tokens kept", title=title, frame=FRAME),
        "names": list(zip(dict.fromkeys(bar.name for bar in bars), SERIES, strict=False)),
        "marked": any(bar.mark is not None for bar in bars),
        "text": layers.coloured(
            list(zip(run.anatomy.tokens, run.anatomy.depth_T, strict=True)), "{:.0%} of the blocks"
        ),
        "strongest": f"{run.anatomy.strongest:.2g}",
        "negative": any(w < 0 for layer in run.anatomy.routed for w in run.anatomy.weight_LT[layer]),
    }


def _experts(run: Shown) -> Markup:
    assert run.anatomy is not None
    bars = [
        Bar(layer=layer, name=name, value=shares[name])
        for layer, shares in run.anatomy.experts.items()
        for name in EXPERT_NAMES
    ]
    title, count = f"{run.name}: share of all choices by layer", len(run.anatomy.weight_LT)
    return charts.bars(bars, layers=count, y_title="share of choices", title=title, frame=FRAME)
