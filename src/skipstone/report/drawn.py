"""`Drawn`: a picture together with the numbers that it shows, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

MOST_ROWS = 60  # of a table: of more, every k-th is shown, and the last


class Drawn(Markup):
    """A picture (SVG) with the table of the numbers that it shows.

    It is Markup, so that it can be used like any other picture. heads: of the columns. rows: cells as text, every
    `every`-th row and the last one, at most MOST_ROWS + 1.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    every: int

    @classmethod
    def of(cls, picture: Markup, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Drawn:
        """Attach a table to a picture, and return it as a `Drawn`."""
        drawn, whole = cls(picture), list(rows)
        drawn.heads, drawn.every = heads, -(-len(whole) // MOST_ROWS) or 1
        kept = whole[:: drawn.every]
        drawn.rows = kept if not whole or kept[-1] is whole[-1] else [*kept, whole[-1]]
        return drawn
