"""Axes of charts: scales from values to pixels, round ticks, and the frame in which every chart is drawn."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from skipstone.report import svg


@dataclass(frozen=True)
class AxisScale:
    """A linear map, called with a value, from values in [low, high] to pixels in [start, stop].

    Values outside of the range are mapped beyond the ends. If low equals high, the result is the middle.
    """

    low: float
    high: float
    start: float
    stop: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        return self.start + (self.stop - self.start) * ((value - self.low) / span if span else 0.5)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Return about `count` round numbers within [low, high], 1, 2 or 5 times a power of ten apart; [low] if empty."""
    if not high > low:
        return [low]
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if raw <= m * power * (1 + 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def short(value: float, digits: int = 3) -> str:
    """Format a tick's value as a short label, such as 12k, 1.5M or 0.25.

    digits: the number of significant digits.
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{digits}g}{letter}"
    return f"{value:.{digits}g}"


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Return tick values with their labels, which have as many digits as are needed to make them differ."""
    for digits in range(3, 8):
        labels = [short(value, digits) for value in values]
        if len({*labels}) == len({*values}):
            break
    return list(zip(values, labels, strict=True)) if values else []


def bounds(values: Iterable[float], margin: float = 0.04) -> tuple[float, float]:
    """Return the range (low, high) of the finite values, widened at each end by `margin` times its length.

    The range of a single value is widened, too, so it is never empty; without finite values, the result is (0, 1).
    """
    finite = [v for v in values if math.isfinite(v)]
    if not finite:
        return 0.0, 1.0
    low, high = min(finite), max(finite)
    pad = (high - low) * margin if high > low else max(abs(high) * margin, 0.5)
    return low - pad, high + pad


@dataclass(frozen=True, kw_only=True)
class Frame:
    """The size of a chart and of the margins around its plot area, in pixels.

    width, height: the whole chart. left, right, top, bottom: the margins, which hold tick labels and axis titles.
    """

    width: float = 350
    height: float = 240
    left: float = 52
    right: float = 12
    top: float = 12
    bottom: float = 44

    @property
    def floor(self) -> float:
        """The y of the plot area's lower edge, in pixels."""
        return self.height - self.bottom

    def across(self, low: float, high: float) -> AxisScale:
        """Return the horizontal scale of the plot area for values from `low` to `high`."""
        return AxisScale(low, high, self.left, self.width - self.right)

    def up(self, low: float, high: float) -> AxisScale:
        """Return the vertical scale of the plot area for values from `low` to `high`."""
        return AxisScale(low, high, self.floor, self.top)

    def y_axis(self, scale: AxisScale, title: str) -> list[Markup]:
        """Draw the y axis as SVG elements: grid lines with their values by `scale`, and the vertical text `title`."""
        parts = []
        for value, label in labelled(ticks(scale.low, scale.high)):
            y = scale(value)
            parts += [svg.line(self.left, y, self.width - self.right, y, "grid")]
            parts += [svg.text(self.left - 8, y + 4, label, "tick", text_anchor="end")]
        middle = (self.top + self.floor) / 2
        turned = f"rotate(-90 14 {svg.number(middle)})"
        return [*parts, svg.text(14, middle, title, "axis", text_anchor="middle", transform=turned)]

    def x_axis(self, title: str, marks: Iterable[tuple[float, str]]) -> list[Markup]:
        """Draw the x axis as SVG elements: the base line, marks and a title.

        title: the text below the axis. marks: pairs of an x coordinate in pixels and the label written there.
        """
        labels = [svg.text(x, self.floor + 17, label, "tick", text_anchor="middle") for x, label in marks]
        middle = (self.left + self.width - self.right) / 2
        base = svg.line(self.left, self.floor, self.width - self.right, self.floor, "base")
        return [base, *labels, svg.text(middle, self.height - 8, title, "axis", text_anchor="middle")]
