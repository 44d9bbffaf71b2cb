"""Pictures of how PolyGLU's neurons mix activation functions: by layer, neuron, kind of token and training step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.measure.token_trace import CATEGORIES, ActivationSummary
from skipstone.report import charts, svg
from skipstone.report.axes import Frame, bounds
from skipstone.report.charts import Bar, Series
from skipstone.report.drawn import Drawn
from skipstone.report.palette import SERIES, style
from skipstone.report.run_view import RunView

FRAME, WIDE, SMALL = Frame(), Frame(left=64), Frame(width=240, height=190)
MAP_WIDTH, ROW, LEFT, GAP = 900, 15, 46, 2
MOST_NEURONS = 450  # of a layer in the map: each two pixels wide at least


def card(run: RunView) -> PlainDict:
    """Return pictures of a run whose neurons mix activations, as variables of the page's template.

    Keys: `run`, the run itself; pictures by block: `shares`, `entropy` and `map` (each neuron's strongest activation);
    `course`, a picture of the entropy over training, or None; `every`, k if only every k-th neuron is drawn;
    `categories`, pairs of a category of tokens (letters, digits, signs, white space) and a picture of its shares;
    `category_names`, pairs of a category and its colour; `shift`, a picture of how far the shares of each category are
    from those of all tokens, or None.
    """
    assert run.trace is not None
    activations, count = run.trace.activations, len(run.trace.weight_LT)
    categories = [
        category for category in CATEGORIES if any(category in layer.by_category for layer in activations.values())
    ]
    return {
        "run": run,
        "shares": _stacked(run, {i: one.shares for i, one in activations.items()}, count, "activations", FRAME),
        "entropy": _entropy(run, activations),
        "course": _course(run),
        "map": neuron_map(activations, names_of(run), f"{run.name}: strongest activation of each neuron"),
        "every": _every(activations),
        "categories": [(category, _of_category(run, activations, category, count)) for category in categories],
        "category_names": list(zip(categories, SERIES, strict=False)),
        "shift": _shift(run, activations, categories, count),
    }


def names_of(run: RunView) -> Sequence[str]:
    """Return the names of the activation functions that a run mixes, in the order of the shares in its trace."""
    return () if run.trace is None else run.trace.activation_names


def _stacked(run: RunView, shares: Mapping[int, Sequence[float]], layers: int, what: str, frame: Frame) -> Drawn:
    return charts.stacked(shares, names_of(run), layers=layers, title=f"{run.name}: {what}", frame=frame)


def _of_category(run: RunView, activations: Mapping[int, ActivationSummary], category: str, layers: int) -> Drawn:
    shares = {i: one.by_category[category] for i, one in activations.items() if category in one.by_category}
    return _stacked(run, shares, layers, f"activations for {category}", SMALL)


def _shift(
    run: RunView, activations: Mapping[int, ActivationSummary], categories: Sequence[str], layers: int
) -> Drawn | None:
    """Draw how far each category's mean shares of activations are from those of all tokens.

    The distance is the total variation distance, by block.
    """
    bars = [
        Bar(layer=layer, name=category, value=one.shift(category))
        for layer, one in activations.items()
        for category in categories
        if category in one.by_category
    ]
    if not bars:
        return None
    title = f"{run.name}: distance of each category's shares from those of all tokens"
    high = max(0.02, *(1.1 * bar.value for bar in bars))
    return charts.bars(bars, layers=layers, y_title="distance", title=title, frame=WIDE, high=min(high, 1.0))


def _entropy(run: RunView, activations: Mapping[int, ActivationSummary]) -> Drawn:
    """Draw the entropy of the neurons' mixes by layer: 1 for all activations alike, 0 for a single one."""
    points = [(float(layer), one.entropy) for layer, one in sorted(activations.items())]
    series = [Series(label=run.name, points=points, style=run.style)]
    x_range = bounds((x for x, _ in points), 0)
    return charts.lines(series, "layer", "entropy / ln 4", f"{run.name}: entropy", FRAME, x_range, (0.0, 1.02))


def _course(run: RunView) -> Drawn | None:
    """Draw the entropy over training, a line per layer; None if it was not logged."""
    series = []
    for line_of in sorted(_logged(run), key=lambda key: int(key.split("/")[1])):
        points = [(float(line["step"]), float(line[line_of])) for line in run.metrics if _trains(line, line_of)]
        layer = int(line_of.split("/")[1])
        series.append(Series(label=f"layer {layer}", points=points, style=style(layer)))
    if not series:
        return None
    x_range = bounds((x for s in series for x, _ in s.points), 0)
    return charts.lines(series, "step", "entropy / ln 4", f"{run.name}: entropy by step", FRAME, x_range, (0.0, 1.02))


def _logged(run: RunView) -> set[str]:
    return {key for line in run.metrics if line.get("split") == "train" for key in line if key.startswith("entropy/")}


def _trains(line: PlainMapping, key: str) -> bool:
    return line.get("split") == "train" and line.get(key) is not None


def _every(activations: Mapping[int, ActivationSummary]) -> int:
    """Return the step k between drawn neurons: the least with which the widest block has at most 450 of them."""
    return -(-max(len(one.strongest) for one in activations.values()) // MOST_NEURONS)


def neuron_map(activations: Mapping[int, ActivationSummary], names: Sequence[str], title: str) -> Drawn:
    """Draw neurons across and blocks upwards, each neuron in the colour of its strongest activation.

    A neuron of PolyGLU mixes several activation functions; its strongest is the one with the largest weight.
    activations: {index of a block: summary of its neurons' mixes}. names: names of the activation functions. title:
    text for screen readers. In large blocks, only every k-th neuron is drawn; equal neighbours share one bar.
    """
    every, layers = _every(activations), max(activations) + 1
    cell = MAP_WIDTH / -(-max(len(one.strongest) for one in activations.values()) // every)
    parts = []
    for layer, one in activations.items():
        y, at = ROW * (layers - 1 - layer), 0
        parts.append(svg.text(LEFT - 8, y + ROW / 2 + 4, str(layer), "tick", text_anchor="end"))
        for k, alike in itertools.groupby(one.strongest[::every]):
            count = len(list(alike))
            shown = "neurons" if every == 1 else f"one of {every} neurons,"
            hover = f"layer {layer}, {shown} {at * every} to {(at + count - 1) * every}: {names[k]}"
            box = (LEFT + cell * at, y, cell * count, ROW - GAP)
            parts.append(svg.rectangle(*box, hover, fill=SERIES[k % len(SERIES)]))
            at += count
    turned = f"rotate(-90 12 {svg.number(ROW * layers / 2)})"
    parts.append(svg.text(12, ROW * layers / 2, "layer", "axis", text_anchor="middle", transform=turned))
    parts.append(svg.text(LEFT + MAP_WIDTH / 2, ROW * layers + 16, "neuron", "axis", text_anchor="middle"))
    picture = svg.drawing(LEFT + MAP_WIDTH + 8, ROW * layers + 24, parts, title)
    rows = [
        (str(layer), *(str(one.strongest.count(k)) for k in range(len(names)))) for layer, one in activations.items()
    ]
    return Drawn.of(picture, ("layer", *(f"neurons with {name}" for name in names)), rows)
