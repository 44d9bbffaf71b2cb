"""Tables of a paper's figures beside ours, and verdicts on claims by their confidence intervals.

A verdict is "yes", "no" or "inconclusive"; it is "no headroom" where more depth does not lower the loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from skipstone.core.strict import PlainMapping
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies.intervals import CONFIDENCE, POWERS, Claim, paired
from skipstone_studies.page import lookup, mean_and_spread

BySeed = Mapping[int, PlainMapping]
ByArm = Mapping[str, BySeed]
Published = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True, kw_only=True)
class PublishedColumn:
    """A column of a table that compares a paper's figures with ours.

    title: its heading. key: dotted path of our figure in the nested figures of a run, such as "training.tokens".
    published: name of the figure among the paper's; "" means that the paper has none. format: a format specification,
    as for Python's format().
    """

    title: str
    key: str
    published: str = ""
    format: str = ".3f"


def values(figures: ByArm, arm: str, key: str) -> list[float]:
    """Return one figure of an arm (a compared recipe) for every seed that has it.

    figures: the figures of every run, {arm: {seed: nested dict}}. arm: name of the arm. key: dotted path of the figure,
    such as "training.tokens".
    """
    return [value for found in figures.get(arm, {}).values() if (value := lookup(found, key)) is not None]


def mean(figures: ByArm, arm: str, key: str) -> float | None:
    """Return the mean of a figure over the seeds of `arm`, a compared recipe; None if no seed has it.

    figures: the figures of every run, {arm (compared recipe): {seed: nested dict}}. key: dotted path of the figure.
    """
    found = values(figures, arm, key)
    return statistics.fmean(found) if found else None


def paired_differences(figures: ByArm, arm: str, other: str, key: str, other_key: str | None = None) -> list[float]:
    """Return, for every seed that two compared recipes have, the figure of `arm` minus the figure of `other`.

    The differences are ordered by seed; seeds that lack one of the figures are left out. figures: the figures of every
    run, {arm (compared recipe): {seed: nested dict}}. key: dotted path of the figure. other_key: dotted path of the
    figure of `other`; None means the same path.
    """
    seeds = figures.get(arm, {}).keys() & figures.get(other, {}).keys()
    pairs = [
        (lookup(figures[arm][seed], key), lookup(figures[other][seed], other_key or key)) for seed in sorted(seeds)
    ]
    return [a - b for a, b in pairs if a is not None and b is not None]


def judge(
    arm: str,
    text: str,
    found: Sequence[float],
    *,
    most: float | None = None,
    least: float | None = None,
    form: str = "+.3f",
    told: str = "",
    blocks: Sequence[Sequence[float]] = (),
) -> Iterator[Claim]:
    """Yield the claim that the mean of `found` is below `most`, or above `least`, with its verdict.

    The verdict is "yes" or "no" if the confidence interval lies on one side of the limit, else "inconclusive", which is
    also the verdict on a single seed. arm: name of the compared recipe. text: what is claimed, in words. found: one
    value per seed, such as paired differences; if empty, nothing is yielded. most, least: the limit; exactly one of
    them is given. form: a format specification for numbers. told: text that is shown before the interval. blocks: for
    each seed, the same value on each block of the validation text; the interval then also includes the variation over
    text. () leaves that out.
    """
    if not found:
        return
    interval, limit = paired(found, blocks), most or least or 0.0
    if interval is None:
        said = f"{told}{found[0]:{form}}, one seed"
        yield Claim(arm=arm, text=text, found=said, verdict="inconclusive", estimate=found[0], limit=limit)
        return
    verdict = interval.below(most) if most is not None else interval.above(limit)
    shown = interval.shown(form) if limit else interval.with_power(form)
    ends = (interval.low, interval.high)
    yield Claim(arm=arm, text=text, found=told + shown, verdict=verdict, estimate=interval.mean, ends=ends, limit=limit)


DETECTABLE = (
    "*Detectable*, shown where the interval contains 0, is the true difference that this number of seeds with this "
    f"noise would find with {' / '.join(f'{power:.0%}' for power in POWERS)} probability."
)
RULE = (
    f"Means with their {CONFIDENCE:.0%} interval over seeds (Student's t of paired differences). The verdict is *yes* "
    f"or *no* where the interval lies on one side of the limit, and otherwise *inconclusive*. {DETECTABLE}"
)


@dataclass(frozen=True, kw_only=True)
class ArmComparison:
    """A comparison of one figure between several recipes and a reference, by differences of runs of equal seed.

    The recipes are the arms of a study. key: dotted path of the figure in the nested figures of a run. title: name of
    the figure. against: name of the reference, whose figure is subtracted. arms: names of the arms to compare; () means
    all arms that have the figure. format: a format specification for the differences. better: whether "low" or "high"
    values are better.
    """

    key: str
    title: str
    against: str
    arms: Sequence[str] = ()
    format: str = "+.4f"
    better: Literal["low", "high"] = "low"


def as_claims(figures: ByArm, compared: Sequence[ArmComparison]) -> Iterator[Claim]:
    """Yield, for each arm of each comparison, the claim that the arm is better than the reference, with its verdict.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    compared: the comparisons.
    """
    for one in compared:
        for arm in (arm for arm in one.arms or figures if arm != one.against):
            found = paired_differences(figures, arm, one.against, one.key)
            most, least = (0.0, None) if one.better == "low" else (None, 0.0)
            text = f"{one.title}: better than {one.against}"
            yield from judge(arm, text, found, most=most, least=least, form=one.format)


def comparisons(figures: ByArm, compared: Sequence[ArmComparison], refused: bool = False) -> str:
    """Return Markdown with a table for each comparison: every recipe's difference from the reference, and the verdict.

    Differences are paired by seed and have a confidence interval; arms that share fewer than two seeds with the
    reference are left out. figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the
    compared recipes. compared: the comparisons. refused: whether the verdict in every row is "no headroom", because a
    deeper model has no lower loss, so that routing has nothing to win. Verdicts are otherwise "better", "worse" or "not
    told apart"; the result is "" without rows.
    """
    sections = []
    for one in compared:
        rows = []
        for arm in one.arms or figures:
            found = paired_differences(figures, arm, one.against, one.key) if arm != one.against else []
            if (interval := paired(found)) is not None:
                good = interval.below() if one.better == "low" else interval.above()
                word = "no headroom" if refused else {"yes": "better", "no": "worse"}.get(good, "not told apart")
                rows.append([arm, str(len(found)), word, interval.with_power(one.format)])
        columns = ["arm", "paired seeds", "verdict", f"difference from {one.against}"]
        title = f"{one.title[0].upper()}{one.title[1:]}: compared with {one.against}"
        sections += [Section(title=title, columns=columns, rows=rows)] if rows else []
    note = f"Means of paired differences with {CONFIDENCE:.0%} intervals over seeds (Student's t). {DETECTABLE}"
    return markdown(sections).strip("\n") + f"\n\n{note}" if sections else ""


def beside(title: str, figures: ByArm, published: Published, shown: Sequence[PublishedColumn], source: str) -> str:
    """Return a Markdown table with a row per arm (compared recipe), in which a paper's figures stand before ours.

    title: its heading. figures: ours, {arm: {seed: nested dict}}; means and spreads over seeds are shown. published:
    the paper's, {arm: {name: value}}. shown: the columns. source: a note below the table.
    """
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
    """Return a Markdown table with a row per claim and a column per arm (compared recipe); "" without claims.

    title: its heading. claims: the claims with their verdicts; claims of equal text share a row.
    """
    by_text: dict[str, dict[str, str]] = {}
    for claim in claims:
        by_text.setdefault(claim.text, {})[claim.arm] = f"{claim.verdict}: {claim.found}"
    arms = list(dict.fromkeys(arm for found in by_text.values() for arm in found))
    rows = [[text, *(found.get(arm, UNKNOWN) for arm in arms)] for text, found in by_text.items()]
    return _table(Section(title=title, columns=["claim, by rule", *arms], rows=rows, notes=[RULE])) if rows else ""


def _table(section: Section) -> str:
    return markdown([section]).strip("\n")
