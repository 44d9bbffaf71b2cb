"""Pictures of the ledger, the costs and claims of all studies: verdicts and hours by study, and intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from skipstone.evaluate.tables import Section
from skipstone.report import svg
from skipstone.report.axes import AxisScale, bounds, labelled, ticks
from skipstone.report.drawn import Drawn
from skipstone.report.palette import BLUE, ORANGE, SKY, VERMILION
from skipstone_studies.intervals import Claim, Verdict

WIDTH, LEFT, RIGHT, ROW, TOP = 640, 210, 110, 22, 8
COLOURS: dict[Verdict, str] = {"yes": BLUE, "no": VERMILION, "inconclusive": ORANGE, "no headroom": SKY}
LONGEST = 34  # characters of a name
HOURS = "core hours"  # the column of the table of costs that is drawn


def verdicts(found: Mapping[str, Sequence[Claim]]) -> Drawn:
    """Return a picture (SVG) with a bar for each study, whose parts count its claims by verdict.

    The picture also carries the numbers as a table. found: the claims about arms (compared recipes) by name of the
    study.
    """
    counts = {study: Counter(claim.verdict for claim in claims) for study, claims in found.items()}
    across = AxisScale(0.0, max(map(len, found.values()), default=1), LEFT, WIDTH - RIGHT)
    parts = grid(across, len(counts))
    for i, (study, by_verdict) in enumerate(counts.items()):
        parts.append(name(i, study))
        start = 0
        for verdict, colour in COLOURS.items():
            stop = start + by_verdict[verdict]
            hover = f"{study}: {by_verdict[verdict]} {verdict}"
            box = (across(start), TOP + ROW * i + 3, across(stop) - across(start), ROW - 6)
            parts += [svg.rectangle(*box, hover, fill=colour)] if stop > start else []
            start = stop
        parts.append(svg.text(across(start) + 6, middle(i), str(start), "value"))
    rows = [(study, *(str(by_verdict[verdict]) for verdict in COLOURS)) for study, by_verdict in counts.items()]
    return _drawn(parts, len(counts), "verdicts on claims about arms, by study", ("study", *COLOURS), rows)


def hours(costs: Section) -> Drawn:
    """Return a picture (SVG) with a bar for the core hours of each study, which also carries them as a table.

    costs: the table of costs, with the study in the first column and a column "core hours". Its last row, the sums, and
    rows without a number of core hours are left out. Raises ValueError if it has no such column.
    """
    column = costs.columns.index(HOURS)
    known = [(row[0], float(row[column])) for row in costs.rows[:-1] if _is_number(row[column])]
    across = AxisScale(0.0, max((value for _, value in known), default=1.0), LEFT, WIDTH - RIGHT)
    parts = grid(across, len(known))
    for i, (study, value) in enumerate(known):
        parts.append(name(i, study))
        box = (LEFT, TOP + ROW * i + 3, across(value) - LEFT, ROW - 6)
        parts.append(svg.rectangle(*box, f"{study}: {value:.2f} {HOURS}", fill=BLUE))
        parts.append(svg.text(across(value) + 6, middle(i), f"{value:.2f}", "value"))
    table = [(study, f"{value:.2f}") for study, value in known]
    return _drawn(parts, len(known), f"{HOURS} of training, by study", ("study", HOURS), table)


def forest(claims: Sequence[Claim], title: str) -> Drawn:
    """Return a picture (SVG) of a claim: for each compared recipe, the estimate with its interval, and the limit.

    The picture also carries its numbers as a table. claims: claims of the same text about different recipes. title: the
    picture's title, for screen readers.
    """
    limits = {claim.limit for claim in claims}
    ends = [end for claim in claims for end in claim.ends or ()]
    values = [claim.estimate for claim in claims if claim.estimate is not None]
    across = AxisScale(*bounds([*ends, *values, *limits], 0.06), LEFT, WIDTH - RIGHT)
    parts, floor = grid(across, len(claims)), TOP + ROW * len(claims)
    parts += [svg.line(across(limit), TOP, across(limit), floor, "mark") for limit in sorted(limits)]
    for i, claim in enumerate(claims):
        parts += [name(i, claim.arm), *_interval(i, claim, across)]
        parts.append(svg.text(WIDTH - RIGHT + 10, middle(i), claim.verdict, "value"))
    rows = [(claim.arm, claim.verdict, claim.found, f"{claim.limit:g}") for claim in claims]
    return _drawn(parts, len(claims), title, ("arm", "verdict", "found", "limit"), rows)


def _interval(i: int, claim: Claim, across: AxisScale) -> list[Markup]:
    """Draw the interval of a claim in row `i` as a line, with a mark at the estimate: filled if the claim is decided.

    across: the horizontal axis.
    """
    colour, y = COLOURS[claim.verdict], TOP + ROW * (i + 0.5)
    parts = []
    hover = svg.element("title", f"{claim.arm}: {claim.found}, {claim.verdict}")
    if claim.ends is not None:
        low, high = map(across, claim.ends)
        parts.append(svg.element("line", hover, x1=low, y1=y, x2=high, y2=y, stroke=colour, stroke_width=2.4))
    if claim.estimate is not None:
        x, decided = across(claim.estimate), claim.verdict in ("yes", "no")
        paint = {"fill": colour} if decided else {"fill": "var(--card)", "stroke": colour, "stroke_width": 2.0}
        if claim.verdict == "no":
            parts.append(svg.element("rect", hover, x=x - 4.5, y=y - 4.5, width=9, height=9, **paint))
        else:
            parts.append(svg.element("circle", hover, cx=x, cy=y, r=4.8, **paint))
    return parts


def forests(study: str, claims: Sequence[Claim]) -> list[tuple[str, Drawn]]:
    """Return pairs (rule in words, picture of its intervals), one for each rule that a study's claims state.

    study: the name of the study, for titles. claims: the claims about all of its arms (compared recipes); those with
    the same `text`, the rule, share a picture, in which each arm has a row.
    """
    by_text: dict[str, list[Claim]] = {}
    for claim in claims:
        by_text.setdefault(claim.text, []).append(claim)
    return [(text, forest(found, f"{study}: {text}")) for text, found in by_text.items()]


def grid(across: AxisScale, rows: int) -> list[Markup]:
    """Draw the vertical grid lines of a picture with `rows` rows, and their values below it.

    across: the horizontal axis, from values to pixels.
    """
    floor, parts = TOP + ROW * rows, []
    for value, label in labelled(ticks(across.low, across.high, 5)):
        parts.append(svg.line(across(value), TOP, across(value), floor, "grid"))
        parts.append(svg.text(across(value), floor + 15, label, "tick", text_anchor="middle"))
    return parts


def name(i: int, text: str) -> Markup:
    """Draw the name `text` to the left of a picture's row with index `i`, cut after 34 characters."""
    cut = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"
    return svg.text(LEFT - 8, middle(i), cut, "tick", text_anchor="end")


def middle(i: int) -> float:
    """Return the y coordinate, in pixels, of the text in a picture's row with index `i`."""
    return TOP + ROW * (i + 0.5) + 4


def _drawn(
    parts: Iterable[Markup], rows: int, title: str, heads: Sequence[str], table: Iterable[Sequence[str]]
) -> Drawn:
    return Drawn.of(svg.drawing(WIDTH, TOP + ROW * rows + 24, parts, title), heads, table)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
