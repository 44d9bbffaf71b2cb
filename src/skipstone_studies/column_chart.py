"""A picture of one column of a study's table: for each compared recipe (arm) its mean and its seeds."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from skipstone.report import svg
from skipstone.report.axes import AxisScale, bounds, short
from skipstone.report.drawn import Drawn
from skipstone.report.palette import BLUE, VERMILION
from skipstone_studies.ledger_charts import LEFT, RIGHT, ROW, TOP, WIDTH, grid, middle, name
from skipstone_studies.study import Column


def draw(column: Column, values: Mapping[str, Sequence[float]], title: str) -> Drawn:
    """Return a picture (SVG) of a column of a study's table, which also carries its numbers as a table.

    Each compared recipe has a row with a dot at its mean and a short line at every seed's value. values: for each
    recipe (arm) its values by seed, at least one. title: the picture's title, for screen readers. If the column says
    whether low or high values are better, the best mean is drawn as a square. column: the column, with its title and
    format.
    """
    means = {arm: statistics.fmean(found) for arm, found in values.items()}
    best = None if column.better is None else (min if column.better == "low" else max)(means.values())
    everything = [value for found in values.values() for value in found]
    across = AxisScale(*bounds(everything, 0.06), LEFT, WIDTH - RIGHT)
    parts = grid(across, len(values))
    for i, (arm, found) in enumerate(values.items()):
        y, told = TOP + ROW * (i + 0.5), format_value(column, means[arm])
        hover = svg.element("title", f"{arm}: {told}")
        parts.append(name(i, arm))
        if len(found) > 1:
            parts += [svg.line(across(value), y - 6, across(value), y + 6, "seed") for value in found]
        x = across(means[arm])
        if means[arm] == best:
            parts.append(svg.element("rect", hover, x=x - 4.5, y=y - 4.5, width=9, height=9, fill=VERMILION))
        else:
            parts.append(svg.element("circle", hover, cx=x, cy=y, r=4.4, fill=BLUE))
        parts.append(svg.text(WIDTH - RIGHT + 10, middle(i), told, "value"))
    rows = [(arm, format_value(column, means[arm]), *_spread(column, found)) for arm, found in values.items()]
    return Drawn.of(
        svg.drawing(WIDTH, TOP + ROW * len(values) + 24, parts, title), ("arm", column.title, "least", "most"), rows
    )


def format_value(column: Column, value: float) -> str:
    """Format a value as the study's table does, or in short form (12k) if that has more than 12 characters.

    column: the column that the value is from, with its format.
    """
    text = format(round(value) if column.format.endswith("d") else value, column.format)
    return text if len(text) <= 12 else short(value)


def _spread(column: Column, found: Sequence[float]) -> tuple[str, str]:
    return format_value(column, min(found)), format_value(column, max(found))
