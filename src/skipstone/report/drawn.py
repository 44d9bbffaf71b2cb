"""`Drawn`: a picture together with the numbers that it shows, as a table."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from markupsafe import Markup

MOST_ROWS = 60  # of a table: of more, every k-th is shown, and the last


class Drawn(Markup):
    """A picture (SVG) that also carries the numbers that it shows as a table.

    It is Markup, so it can be inserted into a page like any other picture. heads: the table's column names. rows: its
    cells as text. every: 1 if the table has all of the picture's numbers; k if it has only every k-th row and the last
    one, which keeps it to about 60 rows.
    """

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    every: int

    @classmethod
    def of(cls, picture: Markup, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Drawn:
        """Return `picture` with a table of the numbers that it shows; long tables keep every k-th row and the last.

        picture: the SVG. heads: the table's column names. rows: its cells as text.
        """
        drawn, whole = cls(picture), list(rows)
        drawn.heads, drawn.every = heads, -(-len(whole) // MOST_ROWS) or 1
        kept = whole[:: drawn.every]
        drawn.rows = kept if not whole or kept[-1] is whole[-1] else [*kept, whole[-1]]
        return drawn
