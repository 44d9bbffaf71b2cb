"""By how much a routed model's loss is lower than that of rivals at equal executed FLOPs, with intervals.

Rivals are dense models of fewer blocks, models that keep random tokens, and early exit. Losses and FLOPs are those of
the pass that really skips (executed). The models are those of the studies of Token-Selective Attention.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skipstone.core.strict import PlainDict
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone_studies import text_blocks
from skipstone_studies.claims import DETECTABLE, ByArm, BySeed
from skipstone_studies.intervals import CONFIDENCE, paired
from skipstone_studies.page import lookup
from skipstone_studies.quality.reset_s3 import interpolate
from skipstone_studies.study import Figures

EXECUTED = "evaluation.ways.executed.loss"
FLOPS = "evaluation.flops_per_token.counted"
RIVALS = {"over_dense": "fewer blocks", "over_random": "random tokens", "over_exit": "early exit"}
BY_BLOCK = "_by_block"


@dataclass(frozen=True, kw_only=True)
class Point:
    """A model as a point in a diagram of loss by FLOPs.

    flops: executed FLOPs per token. losses: losses of the pass that really skips, in nats, first on the whole text and
    then on each block of it.
    """

    flops: float
    losses: tuple[float, ...]


def at_equal_flops(figures: Mapping[str, Figures]) -> dict[str, Figures]:
    """Return each arm's loss minus that of each kind of rival at the arm's executed FLOPs, in nats.

    Both losses are those of the pass that really skips. figures: the figures of each arm (compared recipe) with one
    seed, by arm. The keys of an arm are `over_dense`, `over_random` and `over_exit` for the whole text, and the same
    with "_by_block" appended for lists over blocks of the text. Rivals are interpolated linearly between dense models
    of several depths, between shares of random tokens (and the dense model, which keeps all), and between thresholds of
    early exit. An arm with more FLOPs than the largest rival is compared with that one; if it has fewer than all rivals
    of a kind, the key of that kind is absent. So is the key of an arm's own kind, and `over_random` of dense models.
    """
    points = {arm: point for arm, found in figures.items() if (point := _point(found)) is not None}
    dense = [point for arm, point in points.items() if arm.startswith("dense")]
    drawn = [point for arm, point in points.items() if arm.startswith("random=")]
    whole_model = [points["dense"]] if "dense" in points else []
    exits = _exit_points(figures.get("early-exit", {}))
    over: dict[str, Figures] = {}
    for arm, own in points.items():
        kind = next((name for name in ("dense", "random", "early-exit") if arm.startswith(name)), "")
        rivals = {
            "over_dense": dense if kind != "dense" else [],
            "over_random": [*drawn, *whole_model] if drawn and kind not in ("dense", "random") else [],
            "over_exit": exits if kind != "early-exit" else [],
        }
        found: PlainDict = {}
        for name, rival in rivals.items():
            if rival and min(point.flops for point in rival) <= own.flops:
                whole, *by_block = _over(own, rival)
                found |= {name: whole, name + BY_BLOCK: by_block}
        over[arm] = found
    return over


def _over(own: Point, rival: Sequence[Point]) -> list[float]:
    lines = zip(*(point.losses for point in rival), strict=True)
    flops = [point.flops for point in rival]
    at_own = [interpolate(own.flops, sorted(zip(flops, losses, strict=True))) for losses in lines]
    return [mine - theirs for mine, theirs in zip(own.losses, at_own, strict=True)]


def _point(figures: Figures) -> Point | None:
    flops, loss = lookup(figures, FLOPS), lookup(figures, EXECUTED)
    if flops is None or loss is None:
        return None
    return Point(flops=flops, losses=(loss, *figures[text_blocks.RECORDED]))


def _exit_points(figures: Figures) -> list[Point]:
    return [
        Point(flops=found["flops"], losses=(found["loss"], *found[text_blocks.RECORDED]))
        for found in figures.get("exits", {}).values()
    ]


def blocks_of(seeds: BySeed, rival: str) -> list[list[float]]:
    """Return a routed model's losses minus a rival's on each block of the text, one list for each seed.

    rival: the kind of rival, "over_dense", "over_random" or "over_exit". seeds: the model's figures by seed, with the
    lists that `at_equal_flops` returns under the key rival + "_by_block"; seeds without such a list are left out.
    """
    return [list(found[rival + BY_BLOCK]) for found in seeds.values() if found.get(rival + BY_BLOCK)]


def intervals(figures: ByArm) -> str:
    """Return a Markdown table of loss differences at equal FLOPs, with intervals over seeds and blocks of text.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. The
    table is "" if no arm is compared.
    """
    rows = []
    for arm, seeds in figures.items():
        cells = [_cell(seeds, rival) for rival in RIVALS]
        rows += [[arm, *cells]] if any(cell != UNKNOWN for cell in cells) else []
    note = (
        f"Differences in nats. In brackets: the {CONFIDENCE:.0%} interval over seeds (Student's t) and over blocks of "
        f"{text_blocks.WINDOWS} neighbouring windows of the text; a single seed has none. Below 0, the arm is better "
        f"than its rival at the same executed FLOPs. {DETECTABLE}"
    )
    columns = ["arm", *(f"vs. {name}" for name in RIVALS.values())]
    section = Section(title="At equal executed FLOPs", columns=columns, rows=rows, notes=[note])
    return markdown([section]).strip("\n") if rows else ""


def _cell(seeds: BySeed, rival: str) -> str:
    whole = [found[rival] for found in seeds.values() if rival in found]
    interval = paired(whole, blocks_of(seeds, rival))
    if interval is None:
        return f"{whole[0]:+.3f}, one seed" if whole else UNKNOWN
    return interval.with_power()
