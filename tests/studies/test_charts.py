"""A chart of loss against a quantity: titles of its axes, and what lies outside of their ranges."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

from skipstone.report.drawn import Drawn
from skipstone.report.palette import style
from skipstone_studies.charts import FRAME, ArmSeries, Dot, panel


def chart(points: list[tuple[float, float]], star: tuple[float, float] | None = None) -> Drawn:
    dots = [Dot(x=x, y=y, hover=f"{x:g}, {y:g}") for x, y in points]
    optimum = None if star is None else Dot(x=star[0], y=star[1], hover="optimum")
    return panel(
        [ArmSeries(style=style(0), dots=dots, line=points, star=optimum)],
        x_title="size",
        y_title="executed loss, nats a token",
        title="a chart",
        x_range=(1.0, 100.0),
        y_range=(1.0, 2.0),
    )


def test_both_axes_have_the_titles_that_were_given() -> None:
    said = [text.text for text in ElementTree.fromstring(chart([(10.0, 1.5)])).findall("text[@class='axis']")]
    assert said == ["executed loss, nats a token", "size"]


def test_what_lies_outside_is_in_the_table_alone() -> None:
    inside, outside = [(1.0, 1.0), (10.0, 1.5), (100.0, 2.0)], [(10.0, 2.5), (10.0, 0.5), (0.1, 1.5), (1000.0, 1.5)]
    drawn = chart([*inside, *outside], star=(10.0, 3.0))
    root = ElementTree.fromstring(drawn)
    found = [(float(dot.get("cx", 0)), float(dot.get("cy", 0))) for dot in root.findall("circle")]
    assert len(found) == len(inside)
    for x, y in found:
        assert FRAME.left <= x <= FRAME.width - FRAME.right
        assert FRAME.top <= y <= FRAME.floor
    assert root.find("polygon") is None
    assert len(drawn.rows) == len(inside) + len(outside) + 1
    assert ElementTree.fromstring(chart(inside, star=(10.0, 1.5))).find("polygon") is not None
