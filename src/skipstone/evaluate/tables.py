"""`Section`: a table of strings that can be rendered for a terminal (by rich) and as Markdown."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from skipstone.core.strict import PlainMapping

if TYPE_CHECKING:
    from rich.table import Table

    from skipstone.measure.summaries import FigureColumn

UNKNOWN = "–"
NAME_WIDTH = 36  # characters of a row's name that are not broken, however wide the table is


@dataclass(frozen=True, kw_only=True)
class Section:
    """A small table of strings.

    title: its heading. columns: the column names; the first column names the rows. rows: the cells of each row, as many
    as there are columns. notes: lines below the table.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


class OneTable:
    """The base class of results that are shown as one table, which `section` returns."""

    def section(self) -> Section:
        """Return the table's title, columns, rows and notes."""
        raise NotImplementedError

    def markdown(self) -> str:
        """Return the table in Markdown."""
        return markdown([self.section()])

    def table(self) -> Table:
        """Return the table as an object of rich, for printing on a terminal."""
        return rich_table([self.section()])


def rich_table(sections: Iterable[Section]) -> Table:
    """Return all sections, one below the other, as an object of rich, for printing on a terminal."""
    from rich.table import Table
    from rich.text import Text

    page = Table.grid()
    for section in sections:
        if page.row_count:
            page.add_row()
        page.add_row(Text(section.title, style="bold"))
        page.add_row(_rich(section))
        for note in section.notes:
            page.add_row(Text(note, style="italic"))
    return page


def _rich(section: Section) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    named = max(len(cells[0]) for cells in (section.columns, *section.rows))
    for i, column in enumerate(section.columns):
        width = None if i else min(named, NAME_WIDTH)
        table.add_column(Text(column), justify="right" if i else "left", overflow="fold", min_width=width)
    for row in section.rows:
        table.add_row(*map(Text, row))
    return table


def markdown(sections: Iterable[Section]) -> str:
    """Return sections as Markdown tables under headings."""
    return "\n".join(_markdown(section) for section in sections)


def _markdown(section: Section) -> str:
    rule = ["---", *["---:"] * (len(section.columns) - 1)]
    lines = [f"### {section.title}", "", *(_line(cells) for cells in (section.columns, rule, *section.rows))]
    notes = [line for note in section.notes for line in ("", note)]
    return "\n".join([*lines, *notes, ""])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def number(value: float | None, digits: int = 4) -> str:
    """Format `value` with `digits` digits after the point; a dash for None and nan."""
    return UNKNOWN if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(share: float | None, digits: int = 1) -> str:
    """Format a share in [0, 1] as a percentage with `digits` digits after the point; a dash for None and nan."""
    return UNKNOWN if share is None or math.isnan(share) else f"{100 * share:.{digits}f} %"


def amount(value: float | None) -> str:
    """Format `value` for a table: as an integer below a million, else with a letter, such as 12,345 or 12.35M.

    None and nan give a dash.
    """
    if value is None or math.isnan(value):
        return UNKNOWN
    for unit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= unit:
            return f"{value / unit:.4g}{letter}"
    return f"{value:,.0f}"


def plain(value: Any) -> Any:
    """Return `value` for JSON: nan and infinity become None, also in nested dicts, lists and tuples.

    Keys of dicts become strings, and tuples become lists.
    """
    if isinstance(value, dict):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def layer_sections(layers: Sequence[Mapping[str, PlainMapping]], pass_name: str) -> list[Section]:
    """Tabulate the figures of the mechanisms of each block, with a row for each block and mechanism.

    Mechanisms of one kind, such as depth mechanisms or experts, share a section (in some cases two); kinds that the
    model does not have are left out. layers: for each block a dict {mechanism name: {figure: value}}. pass_name: the
    measured pass, shown in titles.
    """
    from skipstone.measure.summaries import READERS

    entries = [(str(i), name, figures) for i, layer in enumerate(layers) for name, figures in layer.items()]
    found = []
    for table in (table for reader in READERS.values() for table in reader.tables):
        rows = [
            [f"{layer} {name}", *(_cell(column, figures) for column in table.columns)]
            for layer, name, figures in entries
            if table.key in figures
        ]
        if rows:
            columns = [table.first, *(column.title for column in table.columns)]
            notes = [] if table.note is None else [table.note]
            found.append(Section(title=f"{table.title}, {pass_name}", columns=columns, rows=rows, notes=notes))
    return found


def _cell(column: FigureColumn, figures: PlainMapping) -> str:
    value = column.value(figures)
    return percent(value) if column.digits is None else number(value, column.digits)
