"""One self-contained HTML page about runs, made of figures that the package `measure` has taken.

rendering.py      `write_report`: run folders in, one HTML file out
run_view.py       the figures and files of one run
report_page.py    the sections of the page, from runs to strings and pictures
token_picture.py  the tokens x layers picture and coloured text
trace_table.py    a file of `skipstone trace`, read back
mixes.py          pictures of the mixed activations
frontier_chart.py     loss against executed FLOPs of several runs, the best marked
allocation_charts.py  compute by kind, frequency and position of tokens, and against their loss
drawn.py          a picture with its numbers as a table
budget_chart.py   loss by budget, from files of `skipstone eval --budget --json`
charts.py         lines, bars, stacked bars
axes.py           scales, ticks, the frame of a chart
in_notebook.py    text and pictures as the output of a notebook's cell
templating.py     the templates of all pages, and the one script that a page runs
svg.py            SVG elements as escaped strings
palette.py        colours that remain distinct in colour blindness
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.report.in_notebook import show_text, show_trace
    from skipstone.report.rendering import write_report

__all__ = ["show_text", "show_trace", "write_report"]

_HOMES = {"write_report": "rendering", "show_text": "in_notebook", "show_trace": "in_notebook"}


def __getattr__(name: str) -> object:
    """Load jinja2 when something is rendered: charts and palette do not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'skipstone.report' has no attribute {name!r}")
    return getattr(import_module(f"skipstone.report.{_HOMES[name]}"), name)
