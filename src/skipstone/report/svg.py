"""SVG elements as escaped strings: enough for charts without a plotting library, and valid inside HTML."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape


def number(value: float) -> str:
    """Format the coordinate or length `value` with at most two decimals, which keeps pages small; 0 without a sign."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text == "-0" else text


def element(name: str, *children: str | Markup, **attributes: str | float | None) -> Markup:
    """Build the SVG element `<name ...>children</name>`; children that are strings are escaped, `Markup` is not.

    attributes: numbers are written with at most two decimals, and attributes that are None are left out. Names lose a
    trailing underscore (`class_`), and their other underscores become hyphens (`stroke_width`).
    """
    shown = Markup().join(
        Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), value if isinstance(value, str) else number(value))
        for key, value in attributes.items()
        if value is not None
    )
    inner = Markup().join(escape(child) for child in children)
    return Markup("<{}{}>{}</{}>").format(name, shown, inner, name)


def drawing(width: float, height: float, children: Iterable[Markup], title: str) -> Markup:
    """Build an SVG picture of `width` by `height` pixels that shrinks with the page.

    children: its elements. title: the text for screen readers.
    """
    return element(
        "svg",
        element("title", title),
        *children,
        viewBox=f"0 0 {number(width)} {number(height)}",
        role="img",
        style=f"max-width: {number(width)}px",
    )


def text(x: float, y: float, content: str, class_: str = "", **attributes: str | float | None) -> Markup:
    """Build an SVG text element at (x, y).

    content: the text. class_: its CSS class, "" for none. attributes: further attributes of the element; underscores in
    their names become hyphens.
    """
    return element("text", content, x=x, y=y, class_=class_ or None, **attributes)


def line(x1: float, y1: float, x2: float, y2: float, class_: str) -> Markup:
    """Build an SVG line from (x1, y1) to (x2, y2) with the CSS class `class_`."""
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def rectangle(
    x: float, y: float, width: float, height: float, hover: str = "", **attributes: str | float | None
) -> Markup:
    """Build an SVG rectangle with its upper left corner at (x, y), of size `width` by `height`.

    hover: text that a browser shows when the pointer rests on it; "" for none. attributes: further attributes of the
    element; underscores in their names become hyphens.
    """
    inside = [element("title", hover)] if hover else []
    return element("rect", *inside, x=x, y=y, width=max(width, 0.0), height=max(height, 0.0), **attributes)


def polyline(points: Iterable[tuple[float, float]], colour: str, dash: str = "", hover: str = "") -> Markup:
    """Build an SVG polyline through `points`, pairs (x, y) in pixels.

    colour: colour of the stroke. dash: an SVG stroke-dasharray, "" for a solid line. hover: text that a browser shows
    when the pointer rests on it; "" for none.
    """
    path = " ".join(f"{number(x)},{number(y)}" for x, y in points)
    inside = [element("title", hover)] if hover else []
    return element("polyline", *inside, points=path, class_="curve", stroke=colour, stroke_dasharray=dash or None)
