"""Colours that remain distinct in colour blindness (the palette of Okabe and Ito, 2008), and dashes beyond them."""

from __future__ import annotations

from typing import NamedTuple

BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"
SERIES = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY)
DASHES = ("", "7 3", "2 3", "9 3 2 3")


class Style(NamedTuple):
    """The colour and dash with which a run is drawn in every picture.

    colour: a CSS colour. dash: an SVG stroke-dasharray, "" for a solid line.
    """

    colour: str
    dash: str


def style(index: int) -> Style:
    """Return the style of the run with index `index`: all six colours solid first, then each with one of three dashes.

    The styles repeat after 24.
    """
    return Style(SERIES[index % len(SERIES)], DASHES[index // len(SERIES) % len(DASHES)])
