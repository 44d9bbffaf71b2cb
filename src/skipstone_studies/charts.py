"""Charts of loss against a quantity on a logarithmic axis: measured points, parabola, optimum, reference level."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from skipstone.report import svg
from skipstone.report.axes import AxisScale, Frame, bounds, short
from skipstone.report.drawn import Drawn
from skipstone.report.palette import Style

FRAME = Frame(width=500, height=320, left=60, right=16, top=16, bottom=48)
STEPS = 80  # pieces of a drawn parabola
Label = Callable[[float], str]


@dataclass(frozen=True, kw_only=True)
class Dot:
    """A point of a chart.

    x, y: its coordinates in the data's units. hover: text shown by a browser when the mouse is over it. faint: whether
    it is drawn small and pale, for one of several seeds. hollow: whether only its outline is drawn, for a value that is
    interpolated or fitted instead of measured.
    """

    x: float
    y: float
    hover: str
    faint: bool = False
    hollow: bool = False


@dataclass(frozen=True, kw_only=True)
class ArmSeries:
    """An arm of a study (one of the compared recipes) as it is drawn in a chart.

    style: colour and dash. dots: its points. line: points (x, y) of a curve through them, such as a fitted parabola.
    star: the optimum, or None.
    """

    style: Style
    dots: Sequence[Dot]
    line: Sequence[tuple[float, float]] = ()
    star: Dot | None = None


@dataclass(frozen=True, kw_only=True)
class Level:
    """A horizontal reference line in a chart, with vertical lines where curves reach it.

    y: the loss. label: its text. drops: (x, label) of vertical lines from the level down to the axis.
    """

    y: float
    label: str
    drops: Sequence[tuple[float, str]] = ()


def log_ticks(low: float, high: float) -> list[float]:
    """Return values within [low, high] as ticks of a logarithmic axis: round ones, finer if the range is narrow.

    If the range has fewer than four values of two significant digits, the ticks are its ends, [low, high]. low, high:
    positive.
    """
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(i / 10 for i in range(10, 100))):
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        found = [step * 10.0**power for power in powers for step in steps]
        found = [value for value in found if low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if len(found) >= 4:
            return found[:: math.ceil(len(found) / 7)]
    return [low, high]


def log_bounds(values: Sequence[float]) -> tuple[float, float]:
    """Return the range (low, high) of positive `values`, widened at each end by a twentieth of its length.

    The length is that on a logarithmic axis.
    """
    low, high = bounds((math.log10(value) for value in values), 0.05)
    return 10.0**low, 10.0**high


def panel(
    drawn: Sequence[ArmSeries],
    *,
    x_title: str,
    y_title: str,
    title: str,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
    level: Level | None = None,
    label: Label = short,
) -> Drawn:
    """Return a chart (SVG) of loss against a quantity on a logarithmic axis, with its points as a table.

    drawn: the compared recipes (arms), with their points, curves and optima. x_title, y_title: the axes' titles, the
    quantity and the loss. title: the picture's title, for screen readers. x_range, y_range: smallest and largest value
    of each axis; dots, optima and points of curves outside of these are left out of the picture, and the table still
    has the dots and optima. level: a reference line, or None. label: a function that formats a value on the x axis.
    """
    across = FRAME.across(math.log10(x_range[0]), math.log10(x_range[1]))
    up = FRAME.up(*y_range)
    parts = FRAME.y_axis(up, y_title)
    parts += FRAME.x_axis(x_title, [(_x(across, value), label(value)) for value in log_ticks(*x_range)])
    parts += [] if level is None else _level(level, across, up)
    for each in drawn:
        points = [(_x(across, x), up(y)) for x, y in each.line if _inside(x, y, x_range, y_range)]
        parts += [svg.polyline(points, each.style.colour, each.style.dash)] if len(points) > 1 else []
    for each in drawn:
        parts += [_dot(dot, each.style, across, up) for dot in each.dots if _inside(dot.x, dot.y, x_range, y_range)]
        if each.star is not None and _inside(each.star.x, each.star.y, x_range, y_range):
            parts.append(_star(each.star, each.style, across, up))
    if not any(each.dots for each in drawn):
        parts.append(svg.text(FRAME.width / 2, FRAME.height / 2, "no run yet", "axis", text_anchor="middle"))
    dots = [dot for each in drawn for dot in (*each.dots, *([each.star] if each.star else ()))]
    rows = [(dot.hover, f"{dot.x:.4g}", f"{dot.y:.4f}") for dot in dots]
    return Drawn.of(svg.drawing(FRAME.width, FRAME.height, parts, title), ("point", x_title, "loss"), rows)


def _x(across: AxisScale, value: float) -> float:
    return across(math.log10(value))


def _inside(x: float, y: float, x_range: tuple[float, float], y_range: tuple[float, float]) -> bool:
    """Return whether the point (x, y) lies within both ranges (smallest value, largest value)."""
    return x_range[0] <= x <= x_range[1] and y_range[0] <= y <= y_range[1]


def _dot(dot: Dot, style: Style, across: AxisScale, up: AxisScale) -> Markup:
    fill = "var(--card)" if dot.hollow else style.colour
    return svg.element(
        "circle",
        svg.element("title", dot.hover),
        cx=_x(across, dot.x),
        cy=up(dot.y),
        r=2.6 if dot.faint else 4.2,
        fill=fill,
        stroke=style.colour if dot.hollow else None,
        stroke_width=1.6 if dot.hollow else None,
        opacity=0.45 if dot.faint else None,
    )


def _star(star: Dot, style: Style, across: AxisScale, up: AxisScale) -> Markup:
    x, y = _x(across, star.x), up(star.y)
    corners = []
    for i in range(10):
        radius, angle = (9.5, 4.0)[i % 2], math.pi * (i / 5 - 0.5)
        corners.append(f"{svg.number(x + radius * math.cos(angle))},{svg.number(y + radius * math.sin(angle))}")
    hover = svg.element("title", star.hover)
    paint = {"fill": "var(--card)", "stroke": style.colour} if star.hollow else {"fill": style.colour}
    return svg.element("polygon", hover, points=" ".join(corners), class_="star", **paint)


def _level(level: Level, across: AxisScale, up: AxisScale) -> list[Markup]:
    y = up(level.y)
    parts = [svg.line(FRAME.left, y, FRAME.width - FRAME.right, y, "level")]
    parts.append(svg.text(FRAME.width - FRAME.right, y - 6, level.label, "said", text_anchor="end"))
    for i, (value, text) in enumerate(level.drops):
        x = _x(across, value)
        parts.append(svg.line(x, y, x, FRAME.floor, "level"))
        # The text goes to the lower left, which is free: the arm's curve lies above the level there.
        parts.append(svg.text(x - 5, y + 15 + 15 * i, text, "said", text_anchor="end"))
    return parts
