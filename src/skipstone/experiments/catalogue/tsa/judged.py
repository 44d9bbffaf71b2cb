"""Which of the paper's claims hold: each a rule with its threshold in the text, judged on means over seeds.

Differences are between runs of one seed, in nats.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence

from skipstone.experiments.catalogue.reset_s3 import interpolate
from skipstone.experiments.catalogue.tsa.published import JITTER, SHAKESPEARE
from skipstone.experiments.claims import ByArm, Claim, mean, paired
from skipstone.experiments.gates import EXITS, exit_name
from skipstone.experiments.registry import Figures
from skipstone.experiments.render import lookup, mean_and_spread

SOFT, EXECUTED = "evaluation.ways.oracle.loss", "evaluation.ways.executed.loss"
FLOPS = "evaluation.flops_per_token.counted"
REALLY = 0.9  # of what is claimed as saved, to be called saved
Points = list[tuple[float, float]]


def at_equal_flops(figures: Mapping[str, Figures]) -> dict[str, Figures]:
    """over_dense, over_exit: each arm's executed loss less that of dense models and of early exit at its FLOPs.

    In nats, on straight lines between the dense models of several depths, and between the thresholds of early exit. An
    arm that needs more FLOPs than the best of them is held against that one; one that needs less than all is not.
    """
    dense = _points(found for arm, found in figures.items() if arm.startswith("dense"))
    exits = _exit_points(figures.get("early-exit", {}))
    found: dict[str, Figures] = {}
    for arm, own in figures.items():
        flops, loss = lookup(own, FLOPS), lookup(own, EXECUTED)
        rivals = {
            "over_dense": dense if not arm.startswith("dense") else [],
            "over_exit": exits if arm != "early-exit" else [],
        }
        if flops is not None and loss is not None:
            found[arm] = {k: loss - interpolate(flops, at) for k, at in rivals.items() if at and at[0][0] <= flops}
    return found


def _points(figures: Iterator[Figures]) -> Points:
    pairs = [(lookup(found, FLOPS), lookup(found, EXECUTED)) for found in figures]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def _exit_points(figures: Figures) -> Points:
    names = [f"exits.{exit_name(threshold)}" for threshold in EXITS]
    pairs = [(lookup(figures, f"{name}.flops"), lookup(figures, f"{name}.loss")) for name in names]
    return sorted((x, y) for x, y in pairs if x is not None and y is not None)


def language(figures: ByArm) -> list[Claim]:
    """Of every arm whose gates are trained soft, of the sweep, and of every budget that is trained as executed."""
    gated = [arm for arm in figures if mean(figures, arm, "variants.one") is not None]
    budgets = [arm for arm in figures if arm.startswith("hard=")]
    return [
        *(claim for arm in gated for claim in _of_arm(figures, arm)),
        *_sweep(figures),
        *(claim for arm in budgets for claim in _of_budget(figures, arm)),
    ]


def _of_arm(figures: ByArm, arm: str) -> Iterator[Claim]:
    claimed, skipped = mean(figures, arm, "claimed"), mean(figures, arm, "skipped")
    start = mean(figures, arm, "variants.at_start")
    if claimed is not None and skipped is not None and start is not None:
        yield Claim(
            arm=arm,
            text=f"at least {REALLY:.0%} of what is claimed as saved is skipped",
            found=f"{skipped:.1%} of {claimed:.1%}",
            holds=skipped >= REALLY * claimed,
        )
        yield Claim(
            arm=arm,
            text="more is claimed as saved than the start bias gives before training",
            found=f"{claimed:.1%}, before {start:.1%}",
            holds=claimed > start,
        )
    for kind, key in (("soft", SOFT), ("executed", EXECUTED)):
        yield from _within(
            arm, f"{kind} loss within {JITTER} nats of dense", paired(figures, arm, "dense", key), JITTER
        )
    chance = paired(figures, arm, arm, "variants.one", "variants.random")
    yield from _below(arm, "skipping beats random tokens, as many (in every seed)", chance)
    yield from _rivals(figures, arm)


def _of_budget(figures: ByArm, arm: str) -> Iterator[Claim]:
    drawn = paired(figures, arm, arm.replace("hard", "random"), EXECUTED)
    yield from _below(arm, "executed, below chance that keeps as many (in every seed)", drawn)
    yield from _rivals(figures, arm)


def _rivals(figures: ByArm, arm: str) -> Iterator[Claim]:
    for key, rival in (("over_dense", "fewer blocks"), ("over_exit", "early exit")):
        found = [value for own in figures[arm].values() if (value := lookup(own, key)) is not None]
        yield from _below(arm, f"executed, below {rival} at equal FLOPs (in every seed)", found)


def _sweep(figures: ByArm) -> Iterator[Claim]:
    allowed = SHAKESPEARE["lambda=0.1"]["loss"] - SHAKESPEARE["lambda=0"]["loss"] + JITTER
    for kind, key in (("soft", SOFT), ("executed", EXECUTED)):
        text = f"{kind} loss within {allowed:.3f} nats of lambda 0"
        yield from _within("lambda=0.1", text, paired(figures, "lambda=0.1", "lambda=0", key), allowed)


def _within(arm: str, text: str, found: Sequence[float], most: float) -> Iterator[Claim]:
    if found:
        yield Claim(arm=arm, text=text, found=mean_and_spread(found, "+.3f"), holds=statistics.fmean(found) <= most)


def _below(arm: str, text: str, found: Sequence[float]) -> Iterator[Claim]:
    if found:
        yield Claim(arm=arm, text=text, found=mean_and_spread(found, "+.3f"), holds=max(found) < 0)
