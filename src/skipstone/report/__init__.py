"""Floor 4: one self-contained HTML page about runs. Reports only draw: what they show is measured in `measure`.

rendering.py      `write_report`: run folders in, one HTML file out
run_view.py       what a report needs to know of a run
report_page.py    runs -> what the template shows
token_picture.py  the tokens x layers picture and coloured text
mixes.py          pictures of what activation mechanisms mix
budget_chart.py   loss by budget, from files of `skipstone eval --budget --json`
charts.py         lines, bars, stacked bars
axes.py           scales, ticks, the frame of a chart
svg.py            SVG elements as escaped strings
palette.py        colours that the colour-blind can tell apart
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.report.rendering import write_report

__all__ = ["write_report"]


def __getattr__(name: str) -> object:
    """Load torch and jinja2 when a report is written: charts and palette need neither."""
    if name != "write_report":
        raise AttributeError(f"module 'skipstone.report' has no attribute {name!r}")
    from skipstone.report.rendering import write_report

    return write_report
