"""Sections of the pages of studies that train models at equal FLOPs (`protocol.py`).

They are differences of test losses between arms (compared recipes), the learning rates that were tried, how long models
were trained, and claims with verdicts.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace

from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies.claims import DETECTABLE, ByArm, Claim, judge, mean, paired_differences
from skipstone_studies.headroom import Headroom, headroom
from skipstone_studies.intervals import CONFIDENCE, Interval, paired

LOSS, BLOCKS = "loss", "blocks"
UNEQUAL = 0.03  # deviation of an arm's training FLOPs that the page points out
GOAL = 0.02  # nats

COLUMNS_NOTE = (
    "Losses are those of the executed pass, in nats a byte: *test* on rows that are evenly spaced over the test split, "
    "*validation* on those that also chose the rate. Training FLOPs follow from the capacities that were logged. "
    "GFLOP/s are training FLOPs by second of CPU time, which other processes on the machine do not take."
)


def room_of(figures: ByArm, full: str, rivals: Sequence[str]) -> Headroom | None:
    """Return by how much the full model's test loss is below that of the best shallower model, or None.

    None means that they have no seed in common yet. figures: the figures of every run, {arm (compared recipe): {seed:
    nested dict}}. full: name of the full model. rivals: names of the models with fewer blocks.
    """
    return headroom(figures, full, rivals, LOSS)


def headroom_text(room: Headroom | None, full: str, rivals: Sequence[str]) -> str:
    """Return a sentence on the headroom: by how much the full model's loss is below the best shallower model's.

    No verdict on routing is given unless the headroom is known and large enough. room: the headroom; if it is None, the
    sentence says which models have to run first. full: name of the full model. rivals: names of the models with fewer
    blocks.
    """
    if room is not None:
        return room.sentence()
    missing = f"{full} and {' or '.join(rivals)} have run"
    return f"The headroom is not known before {missing}; until then, no verdict is given."


def differences(figures: ByArm, against: str, refused: bool) -> str:
    """Return a Markdown table of the arms' differences in test loss from one arm, paired by seed, with intervals.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. against:
    name of the arm that is subtracted. refused: whether the verdicts are "no headroom", because a deeper model has no
    lower loss; otherwise they are "better", "worse", "not told apart" or "one seed". In either case, it is "other text"
    for an arm that was measured on another test text. The table is "" if `against` has not run.
    """
    rows = []
    for arm in figures:
        found = paired_differences(figures, arm, against, LOSS) if arm != against else []
        if not found:
            continue
        verdict = "no headroom" if refused else _word(paired(found, by_block(figures, arm, against)))
        if not _same_text(figures, arm, against):
            verdict = "other text"
        rows.append([arm, *difference(figures, arm, against), verdict])
    columns = ["arm", "seeds", f"test loss − {against}'s", "error from the text alone", "verdict"]
    title = f"Compared with {against}"
    return markdown([Section(title=title, columns=columns, rows=rows)]).strip("\n") if rows else ""


def difference(figures: ByArm, arm: str, against: str) -> list[str]:
    """Return three cells of a table on the difference in test loss between two arms, `arm` minus `against`.

    They are the number of seeds, the mean difference with its interval, and the standard error of the difference over
    blocks of text. figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared
    recipes. arm, against: names of two arms that share a seed.
    """
    found = paired_differences(figures, arm, against, LOSS)
    interval, text = paired(found, by_block(figures, arm, against)), _text_error(figures, arm, against)
    shown = f"{statistics.fmean(found):+.4f}" if interval is None else interval.with_power("+.4f")
    return [str(len(found)), shown, UNKNOWN if text is None else f"± {text:.4f}"]


def median_block(figures: ByArm, arm: str, against: str) -> str:
    """Return the median over blocks of text of the difference in test loss, averaged over seeds, as a table cell.

    Unlike the mean, it does not depend on a single file, such as a long table that one model has learned to copy.
    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. arm,
    against: names of two arms that share a seed.
    """
    blocks = [statistics.fmean(values) for values in zip(*by_block(figures, arm, against), strict=True)]
    return f"{statistics.median(blocks):+.4f}" if blocks else UNKNOWN


def _same_text(figures: ByArm, arm: str, other: str) -> bool:
    """Return whether the test texts of two arms are equally long in every seed that both have.

    A corpus of installed packages changes with them, so records made on two machines may be of different texts.
    """
    seeds = figures[arm].keys() & figures[other].keys()
    return all(figures[arm][seed].get("test_bytes") == figures[other][seed].get("test_bytes") for seed in seeds)


def _word(interval: Interval | None) -> str:
    if interval is None:
        return "one seed"
    return {"yes": "better", "no": "worse"}.get(interval.below(), "not told apart")


def by_block(figures: ByArm, arm: str, other: str) -> list[list[float]]:
    """Return, for every seed that both arms have, the differences in test loss (`arm` minus `other`) by block of text.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. arm,
    other: names of the arms.
    """
    seeds = sorted(figures[arm].keys() & figures[other].keys())
    pairs = [(figures[arm][seed].get(BLOCKS), figures[other][seed].get(BLOCKS)) for seed in seeds]
    return [[a - b for a, b in zip(one, two, strict=True)] for one, two in pairs if one and two]


def _text_error(figures: ByArm, arm: str, other: str) -> float | None:
    """Return the standard error over blocks of text of two arms' difference in test loss, averaged over seeds.

    None for fewer than two blocks. It does not include the variation between seeds.
    """
    blocks = [statistics.fmean(values) for values in zip(*by_block(figures, arm, other), strict=True)]
    return statistics.stdev(blocks) / math.sqrt(len(blocks)) if len(blocks) > 1 else None


NOTE = (
    f"Differences are paired by seed; in brackets, the {CONFIDENCE:.0%} interval over seeds and blocks of text (t). "
    "One seed has no interval and gets no verdict: the error from the text alone leaves out what another seed would "
    f"change. {DETECTABLE}"
)


def rates(figures: ByArm) -> str:
    """Return a Markdown table of the validation loss at every learning rate that was tried; "" if none was tuned.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    tried = {arm: next(iter(seeds.values()))["tuning"] for arm, seeds in figures.items() if seeds}
    if not any(found["losses"] for found in tried.values()):
        return ""
    names = sorted({rate for found in tried.values() for rate in found["losses"]}, key=float)
    rows = []
    for arm, found in tried.items():
        cells = [found["losses"].get(rate) for rate in names]
        best = f"{found['rate']:g}"
        shown = [
            UNKNOWN if cell is None else f"**{cell:.3f}**" if name == best else f"{cell:.3f}"
            for name, cell in zip(names, cells, strict=True)
        ]
        rows.append([arm, *shown, "yes" if found["inside"] else "**no**"])
    columns = ["arm", *names, "between worse ones"]
    title = "Learning rates: validation loss of the shorter runs that tune them"
    return markdown([Section(title=title, columns=columns, rows=rows)]).strip("\n") if rows else ""


def unequal(figures: ByArm) -> str:
    """Return a sentence on arms whose executed training FLOPs are more than 3 % off the planned ones; "" if none is.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    shares = {
        arm: executed / planned
        for arm in figures
        if (executed := mean(figures, arm, "training_flops.executed")) is not None
        and (planned := mean(figures, arm, "training_flops.planned"))
    }
    off = [f"{arm} {share - 1:+.1%}" for arm, share in shares.items() if abs(share - 1) > UNEQUAL]
    return f"Training FLOPs are not the planned ones for {', '.join(off)}." if off else ""


def length(figures: ByArm, full: str) -> str:
    """Return a sentence on how long the full model was trained, in bytes per parameter; "" if it has not run.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. full:
    name of its arm.
    """
    read, size = mean(figures, full, "training.tokens"), mean(figures, full, "training.parameters")
    if read is None or not size:
        return ""
    return (
        f"{full} has {size / 1e6:.2f} M parameters and reads {read / 1e6:.2f} M bytes, {read / size:.2f} bytes a "
        "parameter; the design asks for 10 before a negative result says much."
    )


def claims(figures: ByArm, room: Headroom | None, against: Sequence[str]) -> Iterator[Claim]:
    """Yield for each arm the claim that its test loss is at least 0.02 nats below each reference's, with its verdict.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. room:
    the headroom, by how much the full model's loss is below that of the best shallower one; if it is None or too small,
    the verdict is "no headroom". against: names of the references.
    """
    for reference in against:
        for arm in figures:
            if arm == reference or reference not in figures:
                continue
            found = paired_differences(figures, arm, reference, LOSS)
            text = f"test loss at equal training FLOPs: at least {GOAL} nats below {reference}"
            for claim in judge(arm, text, found, most=-GOAL, form="+.4f", blocks=by_block(figures, arm, reference)):
                refused = room is None or not room.there
                yield replace(claim, verdict="no headroom") if refused else claim
