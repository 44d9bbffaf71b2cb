"""A study's page as HTML by the parts of `skipstone report`: the text and tables of its Markdown page, and pictures.

Every column in which arms (compared recipes) differ is drawn, and every claim as the intervals that decide it.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from jinja2 import ChoiceLoader, PackageLoader
from markdown_it import MarkdownIt
from markupsafe import Markup

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.report.drawn import Drawn
from skipstone.report.templating import environment, script
from skipstone_studies import column_chart, ledger_charts
from skipstone_studies.claims import RULE
from skipstone_studies.page import block, column_values, figures_of, groups, heading, left_out, provenance
from skipstone_studies.record import Record
from skipstone_studies.study import Study

FEWEST = 2  # arms of a column that is drawn

ByArm = Mapping[str, Mapping[int, PlainMapping]]


def render(study: Study, records: Sequence[Record]) -> str:
    """Return a study's page as HTML: the text and tables of its Markdown page, with pictures of columns and claims.

    Columns are drawn in which compared recipes differ. study: the study. records: the stored results of its runs;
    results of configurations that it no longer has are left out.
    """
    pages = environment()
    assert pages.loader is not None
    pages.loader = ChoiceLoader([PackageLoader("skipstone_studies", "templates"), pages.loader])
    parts = list(groups(study, records))
    return pages.get_template("study.html").render(
        name=study.name,
        purpose=study.purpose,
        about=html(study.about),
        parts=[_part(study, current) for current in parts],
        left_out=left_out(sum(map(len, parts)), len(records)),
        rule=RULE,
        colours=ledger_charts.COLOURS,
        **script(),
    )


def _part(study: Study, records: Sequence[Record]) -> PlainDict:
    """Return the template's variables for the part of a page that shows one scale and corpus.

    records: as `page.groups` yields them.
    """
    figures, title = figures_of(study, records), heading(records)
    claims = [] if study.claims is None else list(study.claims(figures))
    drawn = {} if study.pictures is None else study.pictures(figures)
    return {
        "title": title,
        "table": html(block(study, records)),
        "columns": _columns(study, figures, title),
        "claims": ledger_charts.forests(f"{study.name}, {title}", claims),
        "pictures": [(name, Markup(svg)) for name, svg in drawn.items()],
        "details": html("" if study.details is None else study.details(figures)),
        "provenance": html(provenance(records)),
    }


def _columns(study: Study, figures: ByArm, title: str) -> list[tuple[str, Drawn]]:
    """Draw each column of the table that several arms have with different values; return pairs of title and picture.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. title:
    the heading of this part of the page.
    """
    found, titles = [], [column.title for column in study.columns]
    for column in study.columns:
        named = column.title if titles.count(column.title) == 1 else f"{column.title} ({column.key})"
        values = {arm: column_values(column, seeds) for arm, seeds in figures.items()}
        values = {arm: each for arm, each in values.items() if each}
        if len(values) >= FEWEST and len({statistics.fmean(each) for each in values.values()}) > 1:
            found.append((named, column_chart.draw(column, values, f"{study.name}, {title}: {named}")))
    return found


def html(markdown: str) -> Markup:
    """Convert `markdown` with paragraphs, tables and lists to HTML; HTML in it is escaped, images are left out."""
    reader = MarkdownIt("commonmark", {"html": False}).enable("table").disable("image")
    reader.add_render_rule("table_open", _table_open)
    reader.add_render_rule("table_close", lambda *_: "</table></div>\n")
    return Markup(reader.render(markdown))  # escaped by the reader


def _table_open(*_: object) -> str:
    return '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table>\n'
