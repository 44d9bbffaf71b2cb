"""The pictures of a report as the output of a notebook's cell, in Jupyter and in marimo."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from markupsafe import Markup

from skipstone.measure.token_trace import TokenTrace
from skipstone.report import token_picture
from skipstone.report.templating import environment

PICTURED = 84  # tokens across a picture, as in a report
FITTED = (
    ":scope { margin: 0; max-width: none; padding: .8rem 1rem; border: 1px solid var(--rule); border-radius: 8px; }"
)


class NotebookHTML:
    """HTML in the style of a report, which Jupyter and marimo display as the value of a cell.

    html: a complete fragment with its own style, which affects nothing else in the notebook.
    """

    def __init__(self, html: str) -> None:
        self.html = html

    def _repr_html_(self) -> str:
        return self.html


def show_text(
    pieces: Sequence[tuple[str, float]], caption: str = "", hover: str = "{:.0%} of the blocks"
) -> NotebookHTML:
    """Return, for display in a notebook, text coloured by the share of the blocks that was computed for each piece.

    pieces: (text, share of the blocks' computation that was executed for it, in [0, 1]). caption: text shown with it.
    hover: a format string for the share, whose result is shown when the pointer rests on a piece.
    """
    return _rendered(caption=caption, text=token_picture.coloured(pieces, hover), picture=None, strongest=None)


def show_trace(trace: TokenTrace, caption: str = "") -> NotebookHTML:
    """Return a trace's text and its picture of tokens by blocks, for a notebook to display.

    trace: what a model decided for a text. caption: text shown with it. The picture shows the first 84 tokens; the text
    is shown whole.
    """
    pieces = list(zip(trace.tokens, trace.depth_T, strict=True))
    return _rendered(
        caption=caption,
        text=token_picture.coloured(pieces, "{:.0%} of the blocks"),
        picture=token_picture.picture(trace, PICTURED, caption or "blocks that each token took"),
        strongest=f"{trace.strongest:.2g}",
    )


def _rendered(**values: object) -> NotebookHTML:
    return NotebookHTML(environment().get_template("notebook.html").render(style=_scoped_style(), **values))


@cache
def _scoped_style() -> Markup:
    """Return the style sheet of a report for what is inside of `.skipstone` alone."""
    sheet = files("skipstone.report").joinpath("templates/style.css").read_text(encoding="utf-8")
    inside = sheet.replace(":root", ":scope").replace("body {", ":scope {")
    return Markup("@scope (.skipstone) {\n" + inside + FITTED + "\n}")
