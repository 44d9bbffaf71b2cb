"""`Drawn`: a picture together with the numbers that it shows, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

MOST_ROWS = 60  # of a table: of more, every k-th is shown, and the last


class Drawn(Markup):
    """A picture (SVG) that knows its table. It is Markup, so that it can stand wherever a picture can.

    heads: of the columns. rows: cells as text, at most MOST_ROWS and the last one; `every` tells which were taken.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    every: int

    @classmethod
    def of(cls, picture: Markup, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Drawn:
        """Attach a table to a picture."""
        drawn, whole = cls(picture), list(rows)
        drawn.heads, drawn.every = heads, -(-len(whole) // MOST_ROWS) or 1
        kept = whole[:: drawn.every]
        drawn.rows = kept if not whole or kept[-1] is whole[-1] else [*kept, whole[-1]]
        return drawn
