"""The ledger as one self-contained HTML page by the parts of `skipstone report`: pictures with their tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import ChoiceLoader, PackageLoader

from skipstone.evaluate.tables import Section
from skipstone.report.drawn import Drawn
from skipstone.report.templating import environment, script
from skipstone_studies import ledger_charts
from skipstone_studies.claims import RULE
from skipstone_studies.intervals import Claim


def render(costs: Section, claims: Section, by_study: Mapping[str, Sequence[Claim]]) -> str:
    """Return the HTML page. costs: a row for each study and one for all; by_study: every claim that was judged."""
    pages = environment()
    assert pages.loader is not None
    pages.loader = ChoiceLoader([PackageLoader("skipstone_studies", "templates"), pages.loader])
    return pages.get_template("ledger.html").render(
        costs=costs,
        claims=claims,
        rule=RULE,
        colours=ledger_charts.COLOURS,
        verdicts=ledger_charts.verdicts(by_study),
        hours=ledger_charts.hours(costs.rows[:-1], costs.columns.index("core hours")),
        studies=[(study, _pictures(study, found)) for study, found in by_study.items()],
        **script(),
    )


def _pictures(study: str, claims: Sequence[Claim]) -> list[tuple[str, Drawn]]:
    """Return a picture for each claim of a study."""
    by_text: dict[str, list[Claim]] = {}
    for claim in claims:
        by_text.setdefault(claim.text, []).append(claim)
    return [(text, ledger_charts.forest(found, f"{study}: {text}")) for text, found in by_text.items()]
