"""Published figures beside ours, and which claims hold: by rules, from figures, never by hand."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies.page import lookup, mean_and_spread

BySeed = Mapping[int, Mapping[str, Any]]
ByArm = Mapping[str, BySeed]
Published = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class PublishedColumn:
    """One kind of figure. key: where ours is in the figures. published: its name in the published ones, "" for none."""

    title: str
    key: str
    published: str = ""
    format: str = ".3f"


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A published claim about one arm. found: what we measured of it. holds: by the rule that `text` states."""

    arm: str
    text: str
    found: str
    holds: bool


def values(figures: ByArm, arm: str, key: str) -> list[float]:
    """One figure an arm, of every seed that has it."""
    return [value for found in figures.get(arm, {}).values() if (value := lookup(found, key)) is not None]


def mean(figures: ByArm, arm: str, key: str) -> float | None:
    found = values(figures, arm, key)
    return statistics.fmean(found) if found else None


def paired(figures: ByArm, arm: str, other: str, key: str, other_key: str | None = None) -> list[float]:
    """arm's figure less the other arm's, of every seed that has both."""
    seeds = figures.get(arm, {}).keys() & figures.get(other, {}).keys()
    pairs = [
        (lookup(figures[arm][seed], key), lookup(figures[other][seed], other_key or key)) for seed in sorted(seeds)
    ]
    return [a - b for a, b in pairs if a is not None and b is not None]


def beside(title: str, figures: ByArm, published: Published, shown: Sequence[PublishedColumn], source: str) -> str:
    """A table of each arm's figures, the published one before ours."""
    columns = ["arm"]
    for one in shown:
        columns += [f"{one.title}, paper", f"{one.title}, ours"] if one.published else [one.title]
    rows = []
    for arm, seeds in figures.items():
        cells = [arm]
        for one in shown:
            theirs = published.get(arm, {}).get(one.published)
            cells += [UNKNOWN if theirs is None else format(theirs, one.format)] if one.published else []
            cells.append(mean_and_spread(values({arm: seeds}, arm, one.key), one.format))
        rows.append(cells)
    return _table(Section(title=title, columns=columns, rows=rows, notes=[source]))


def claims_table(title: str, claims: Iterable[Claim]) -> str:
    """Markdown: a row for each claim, a column for each arm; nothing where there is nothing to judge yet."""
    by_text: dict[str, dict[str, str]] = {}
    for claim in claims:
        by_text.setdefault(claim.text, {})[claim.arm] = f"{'yes' if claim.holds else 'no'}: {claim.found}"
    arms = list(dict.fromkeys(arm for found in by_text.values() for arm in found))
    rows = [[text, *(found.get(arm, UNKNOWN) for arm in arms)] for text, found in by_text.items()]
    return _table(Section(title=title, columns=["claim, by rule", *arms], rows=rows)) if rows else ""


def _table(section: Section) -> str:
    return markdown([section]).strip("\n")
