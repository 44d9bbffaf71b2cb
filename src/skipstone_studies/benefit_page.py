"""Markdown tables of how much blocks lower each token's loss, from what `benefit.oracle` has measured."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from skipstone.core.strict import PlainMapping
from skipstone.evaluate.tables import Section, markdown
from skipstone_studies.benefit import CAUSAL, ORACLE, RANDOM, SCORES, SHARES

LEAST = 0.02  # nats that the causal bound must be below random

NOTE = (
    "Losses in nats a token above that of the whole model, on held-out rows, where a unit updates only the share of "
    "the tokens with the highest score. *benefit* is measured (it looks at the labels, so no router reaches it); "
    "*regression on the stream* is a regression of it on what enters the unit, fitted on other rows: what a causal "
    "router could know without training the model further. *entropy* is that of the prediction, *gradient norm* that "
    "of the loss at the unit's output, *surprise* the loss of predicting the token just read. Skipped tokens give keys "
    "and values. *Explained* is the share of the benefit's variance that the regression predicts on held-out rows."
)


def tables(measured: PlainMapping, what: str) -> str:
    """Return Markdown tables of how much blocks of one model lower each token's loss, and the verdict below them.

    They show losses by score and by share of kept tokens, for blocks that are skipped together and as a mean over
    single blocks. A score ranks the tokens, and the blocks update those with the highest ones. measured: the dict that
    `benefit.oracle` returned. what: the name of the model, for titles.
    """
    units = measured["units"]
    singles, stacks = [u for u in units if len(u["blocks"]) == 1], [u for u in units if len(u["blocks"]) > 1]
    sections = [_losses(measured, [unit], f"{what}: blocks {_span(unit)} together") for unit in stacks]
    if singles:
        sections.append(_losses(measured, singles, f"{what}: one block at a time, mean of {len(singles)}"))
    sections.append(_units(measured, f"{what}: every unit"))
    return markdown(sections).strip("\n") + "\n\n" + verdict(measured)


def _named(unit: PlainMapping) -> str:
    return f"block{'s' if len(unit['blocks']) > 1 else ''} {_span(unit)}"


def _span(unit: PlainMapping) -> str:
    blocks = unit["blocks"]
    return str(blocks[0]) if len(blocks) == 1 else f"{blocks[0]} to {blocks[-1]}"


def _losses(measured: PlainMapping, units: Sequence[PlainMapping], title: str) -> Section:
    whole = measured["loss"]
    rows = []
    further = sorted({*units[0]["kept"][f"{SHARES[0]:g}"]} - {*SCORES})  # ways to choose that only some studies have
    for score in (*SCORES[:-1], *further, SCORES[-1]):
        cells = [statistics.fmean(u["kept"][f"{share:g}"][score] - whole for u in units) for share in SHARES]
        rows.append([score, *(f"{cell:+.4f}" for cell in cells)])
    removed = statistics.fmean(u["removed"] - whole for u in units)
    note = f"With no token kept: {removed:+.4f}. The whole model: {whole:.4f}."
    return Section(title=title, columns=["kept by", *(f"{share:.1%}" for share in SHARES)], rows=rows, notes=[note])


def _units(measured: PlainMapping, title: str) -> Section:
    columns = ["blocks", "loss without it", "mean benefit", "explained", *(f"correlation: {s}" for s in SCORES[1:-1])]
    rows = [
        [
            _span(unit),
            f"{unit['removed'] - measured['loss']:+.4f}",
            f"{unit['mean_benefit']:+.4f}",
            f"{unit['explained']:.1%}",
            *(f"{unit['correlation'][score]:+.2f}" for score in SCORES[1:-1]),
        ]
        for unit in measured["units"]
    ]
    return Section(title=title, columns=columns, rows=rows)


def advantage(unit: PlainMapping, score: str, share: float) -> float:
    """Return by how many nats the loss is lower than with random tokens if `score` chooses which tokens are updated.

    unit: the dict of some blocks, an entry of `units` in the result of `benefit.oracle`. score: name of the score, such
    as "entropy". share: the share of tokens that are updated.
    """
    kept: Mapping[str, float] = unit["kept"][f"{share:g}"]
    return kept[RANDOM] - kept[score]


def verdict(measured: PlainMapping) -> str:
    """Return Markdown lines, one per unit, on what a router could gain that keeps an eighth or a quarter of the tokens.

    A unit is a group of blocks that are skipped together. The line says that a router could gain if tokens chosen by a
    regression of the benefit (how much these blocks lower a token's loss) beat random tokens by at least 0.02 nats at
    one of these shares. measured: the dict that `benefit.oracle` returned.
    """
    lines = []
    for unit in measured["units"]:
        causal, bound = (max(advantage(unit, score, share) for share in SHARES[:2]) for score in (CAUSAL, ORACLE))
        word = "a router could gain" if causal >= LEAST else "no router that reads this stream gains enough"
        lines.append(
            f"* {_named(unit)}: at {SHARES[0]:.1%} or {SHARES[1]:.1%} kept, the regression is at most "
            f"{causal:+.4f} nats better than random and the benefit itself {bound:+.4f}: {word} (limit +{LEAST})."
        )
    return "\n".join(lines)
