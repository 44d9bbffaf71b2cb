"""The three charts of a report: lines over steps, bars by layer, shares by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from skipstone.report import svg
from skipstone.report.axes import AxisScale, Frame, labelled, ticks
from skipstone.report.drawn import Drawn
from skipstone.report.palette import SERIES, Style

MAX_POINTS = 600  # a curve needs no more points than the page has pixels


@dataclass(frozen=True, kw_only=True)
class Series:
    """One curve of a chart.

    label: its name. points: (x, y) in order of x; points with an infinite or nan y are left out. style: colour and
    dash.
    """

    label: str
    points: Sequence[tuple[float, float]]
    style: Style


def thinned(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return at most 600 finite points and the last one, by replacing neighbouring points by their mean.

    points: (x, y) in order of x; those with an infinite or nan y are left out. 600 points or fewer are returned
    unchanged.
    """
    finite = [p for p in points if math.isfinite(p[1])]
    size = -(-len(finite) // MAX_POINTS)
    if size <= 1:
        return finite
    groups = [finite[i : i + size] for i in range(0, len(finite), size)]
    return [(sum(x for x, _ in g) / len(g), sum(y for _, y in g) / len(g)) for g in groups] + [finite[-1]]


def lines(
    series: Sequence[Series],
    x_title: str,
    y_title: str,
    title: str,
    frame: Frame,
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> Drawn:
    """Draw curves on shared axes; a curve of a single point is a dot.

    series: the curves. x_title, y_title: titles of the axes. title: text for screen readers. frame: size and margins of
    the chart. x_range, y_range: the values at the two ends of each axis.
    """
    kept = [(s, points) for s in series if (points := thinned(s.points))]
    across, up = frame.across(*x_range), frame.up(*y_range)
    parts = frame.y_axis(up, y_title)
    parts += frame.x_axis(x_title, [(across(x), label) for x, label in labelled(ticks(across.low, across.high))])
    for s, points in kept:
        parts += _curve(s, [(across(x), up(y)) for x, y in points])
    if not kept:
        parts.append(svg.text(frame.width / 2, frame.height / 2, "nothing was logged", "axis", text_anchor="middle"))
    rows = [(s.label, f"{x:g}", f"{y:.5g}") for s, points in kept for x, y in points]
    return Drawn.of(svg.drawing(frame.width, frame.height, parts, title), ("", x_title, y_title or title), rows)


def _curve(s: Series, pixels: list[tuple[float, float]]) -> list[Markup]:
    """Draw a curve through `pixels`, with dots where there are few enough points to distinguish."""
    parts = [svg.polyline(pixels, s.style.colour, s.style.dash, s.label)] if len(pixels) > 1 else []
    if len(pixels) <= 20:
        parts += [
            svg.element("circle", svg.element("title", s.label), cx=x, cy=y, r=2.6, fill=s.style.colour)
            for x, y in pixels
        ]
    return parts


@dataclass(frozen=True, kw_only=True)
class Bar:
    """One bar of a chart that has bars for each block of a model.

    layer: index of the block. name: what the bar shows; equal names have the same colour. value: height, in [0, 1].
    mark: a value to compare with, drawn as a tick over the bar; None means no tick.
    """

    layer: int
    name: str
    value: float
    mark: float | None = None


def bars(data: Sequence[Bar], *, layers: int, y_title: str, title: str, frame: Frame, high: float = 1.0) -> Drawn:
    """Draw bars for the blocks of a model, side by side if a block has several; colours follow the bars' names.

    data: the bars. layers: number of blocks. y_title: title of the y axis. title: text for screen readers. frame: size
    and margins of the chart. high: the value at the top of the y axis.
    """
    names = list(dict.fromkeys(bar.name for bar in data))
    up = frame.up(0.0, high)
    slot, parts = _slots(frame, layers)
    parts += frame.y_axis(up, y_title)
    width = 0.68 * slot / max(len(names), 1)
    for bar in data:
        x = frame.left + slot * (bar.layer + 0.16) + width * names.index(bar.name)
        hover = f"layer {bar.layer}, {bar.name}: {bar.value:.1%}" + (
            "" if bar.mark is None else f" (set: {bar.mark:.1%})"
        )
        parts.append(_column(x, width, up, 0.0, bar.value, SERIES[names.index(bar.name) % len(SERIES)], hover))
        if bar.mark is not None:
            parts.append(svg.line(x - 3, up(bar.mark), x + width + 3, up(bar.mark), "mark"))
    rows = [
        (str(bar.layer), bar.name, f"{bar.value:.3g}", "" if bar.mark is None else f"{bar.mark:.3g}") for bar in data
    ]
    return Drawn.of(svg.drawing(frame.width, frame.height, parts, title), ("layer", "", y_title, "as configured"), rows)


def stacked(
    shares: Mapping[int, Sequence[float]], names: Sequence[str], *, layers: int, title: str, frame: Frame
) -> Drawn:
    """Draw shares that sum to 1, as one stack for each block of a model.

    shares: for each block's index its shares, from bottom to top. names: what the shares are of, in the same order.
    layers: number of blocks. title: text for screen readers. frame: size and margins of the chart.
    """
    up = frame.up(0.0, 1.0)
    slot, parts = _slots(frame, layers)
    parts += frame.y_axis(up, "share of activation")
    for layer, parts_of_layer in shares.items():
        base = 0.0
        for k, share in enumerate(parts_of_layer):
            x = frame.left + slot * (layer + 0.12)
            hover = f"layer {layer}, {names[k]}: {share:.1%}"
            parts.append(_column(x, 0.76 * slot, up, base, base + share, SERIES[k % len(SERIES)], hover))
            base += share
    rows = [(str(layer), *(f"{share:.3f}" for share in parts_of_layer)) for layer, parts_of_layer in shares.items()]
    return Drawn.of(svg.drawing(frame.width, frame.height, parts, title), ("layer", *names), rows)


def _slots(frame: Frame, layers: int) -> tuple[float, list[Markup]]:
    """Return the width of a layer's column, and the axis that numbers layers from 0 (every few if they are many)."""
    slot = (frame.width - frame.right - frame.left) / max(layers, 1)
    every = max(1, math.ceil(22 / slot))
    marks = [(frame.left + slot * (i + 0.5), str(i)) for i in range(0, layers, every)]
    return slot, frame.x_axis("layer", marks)


def _column(x: float, width: float, up: AxisScale, low: float, high: float, colour: str, hover: str) -> Markup:
    return svg.rectangle(x, up(high), width, up(low) - up(high), hover, fill=colour)
