"""The ledger (costs and claims of all studies) as one self-contained HTML page: tables and charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jinja2 import ChoiceLoader, PackageLoader

from skipstone.evaluate.tables import Section
from skipstone.report.templating import environment, script
from skipstone_studies import ledger_charts
from skipstone_studies.claims import RULE
from skipstone_studies.intervals import Claim


def render(costs: Section, claims: Section, by_study: Mapping[str, Sequence[Claim]]) -> str:
    """Return the ledger (costs and claims of all studies) as one HTML page with pictures.

    costs: the table of training costs, with a column "core hours", a row for each study and a last one for all.
    claims: the table of claims. by_study: the claims of each study, with their verdicts.
    """
    pages = environment()
    assert pages.loader is not None
    pages.loader = ChoiceLoader([PackageLoader("skipstone_studies", "templates"), pages.loader])
    return pages.get_template("ledger.html").render(
        costs=costs,
        claims=claims,
        rule=RULE,
        colours=ledger_charts.COLOURS,
        verdicts=ledger_charts.verdicts(by_study),
        hours=ledger_charts.hours(costs),
        studies=[(study, ledger_charts.forests(study, found)) for study, found in by_study.items()],
        **script(),
    )
