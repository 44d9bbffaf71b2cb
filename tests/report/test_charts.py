"""Scales, ticks and SVG: drawings match the numbers, and no text of a run can break the page."""

from __future__ import annotations

import math
import xml.etree.ElementTree as ElementTree

import pytest
from markupsafe import Markup

from skipstone.report import svg
from skipstone.report.axes import AxisScale, Frame, bounds, short, ticks
from skipstone.report.charts import MAX_POINTS, Bar, Series, bars, lines, stacked, thinned
from skipstone.report.palette import DASHES, SERIES, style

FRAME = Frame()


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (2.31, 4.4, [2.5, 3.0, 3.5, 4.0]),
        (1, 120, [50, 100]),
        (0.0, 3e6, [0, 1e6, 2e6, 3e6]),
        (5.0, 5.0, [5.0]),
    ],
)
def test_ticks_are_round_and_inside(low: float, high: float, expected: list[float]) -> None:
    assert ticks(low, high) == pytest.approx(expected)


@pytest.mark.parametrize(("value", "label"), [(1500, "1.5k"), (2e6, "2M"), (0.25, "0.25"), (0, "0"), (-1200, "-1.2k")])
def test_short(value: float, label: str) -> None:
    assert short(value) == label


def test_a_scale_is_straight_and_an_empty_one_puts_values_in_the_middle() -> None:
    up = AxisScale(0.0, 2.0, 100.0, 0.0)
    assert [up(0), up(1), up(2)] == [100, 50, 0]
    assert AxisScale(3.0, 3.0, 0.0, 10.0)(3.0) == 5.0


def test_bounds_skip_what_is_not_finite() -> None:
    assert bounds([1.0, math.nan, 3.0, math.inf], 0) == (1.0, 3.0)
    assert bounds([]) == (0.0, 1.0)
    low, high = bounds([2.0, 2.0], 0)
    assert low < 2.0 < high


def test_long_curves_are_thinned_but_keep_their_end() -> None:
    points = [(float(i), float(i)) for i in range(5000)] + [(5000.0, math.nan)]
    kept = thinned(points)
    assert len(kept) <= MAX_POINTS + 1
    assert kept[-1] == (4999.0, 4999.0)
    assert kept == sorted(kept)


def test_attributes_and_text_are_escaped() -> None:
    shape = svg.text(1, 2.345, '<b> & "quoted"', "axis", data_name='"><script>')
    element = ElementTree.fromstring(shape)
    assert element.text == '<b> & "quoted"'
    assert element.get("data-name") == '"><script>'
    assert (element.get("x"), element.get("y")) == ("1", "2.35")


def parsed(picture: Markup) -> ElementTree.Element:
    return ElementTree.fromstring(picture)


def test_lines_have_axes_a_curve_each_and_dots_for_single_points() -> None:
    series = [
        Series(label="a & b", points=[(1, 2.0), (2, 1.0)], style=style(0)),
        Series(label="one", points=[(1, 1.5)], style=style(1)),
        Series(label="none", points=[], style=style(2)),
    ]
    root = parsed(lines(series, "step", "nats", "loss", FRAME, (1, 2), (1, 2)))
    curves = root.findall("polyline")
    assert [curve.findtext("title") for curve in curves] == ["a & b"]
    assert curves[0].get("points") == f"52,12 {FRAME.width - FRAME.right:g},{FRAME.floor:g}"
    assert [dot.get("fill") for dot in root.findall("circle")] == [SERIES[0], SERIES[0], SERIES[1]]
    assert {"step", "nats"} <= {text.text for text in root.findall("text")}
    assert root.findtext("title") == "loss"


def test_lines_without_any_point_say_so() -> None:
    root = parsed(lines([], "step", "nats", "loss", FRAME, (0, 1), (0, 1)))
    assert "nothing was logged" in {text.text for text in root.findall("text")}


def test_bars_are_as_high_as_their_values() -> None:
    data = [Bar(layer=0, name="m", value=0.5, mark=0.25), Bar(layer=2, name="n", value=1.0)]
    root = parsed(bars(data, layers=3, y_title="kept", title="t", frame=FRAME))
    half, whole = root.findall("rect")
    assert float(half.get("height", 0)) * 2 == pytest.approx(float(whole.get("height", 0)))
    assert half.findtext("title") == "layer 0, m: 50.0% (set: 25.0%)"
    assert [mark.get("class") for mark in root.findall("line")].count("mark") == 1
    assert half.get("fill") != whole.get("fill")


def test_stacks_fill_the_whole_height() -> None:
    root = parsed(stacked({0: [0.1, 0.2, 0.3, 0.4]}, ["a", "b", "c", "d"], layers=1, title="t", frame=FRAME))
    heights = [float(part.get("height", 0)) for part in root.findall("rect")]
    assert sum(heights) == pytest.approx(FRAME.floor - FRAME.top, abs=0.05)
    assert heights == sorted(heights)


def test_many_layers_are_numbered_every_few() -> None:
    root = parsed(bars([], layers=64, y_title="kept", title="t", frame=FRAME))
    below = [text.text or "" for text in root.findall("text") if text.get("y") == f"{FRAME.floor + 17:g}"]
    assert below[:3] == ["0", "5", "10"]


def test_twenty_four_runs_look_different() -> None:
    assert len({style(i) for i in range(len(SERIES) * len(DASHES))}) == 24
