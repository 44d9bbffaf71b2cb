"""Which of the paper's claims hold: each a rule with its threshold in the text, judged on means over seeds.

Differences are between runs of one seed, in nats.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from skipstone_studies.claims import ByArm, Claim, mean, paired, values
from skipstone_studies.page import mean_and_spread
from skipstone_studies.quality.tsa.equal_flops import EXECUTED, RIVALS
from skipstone_studies.quality.tsa.published import JITTER, SHAKESPEARE

SOFT = "evaluation.ways.oracle.loss"
REALLY = 0.9  # of what is claimed as saved, to be called saved


def language(figures: ByArm) -> list[Claim]:
    """Of every arm whose gates are trained soft, of the sweep, and of every budget that is trained as executed."""
    gated = [arm for arm in figures if mean(figures, arm, "variants.one") is not None]
    budgets = [arm for arm in figures if arm.startswith("hard=")]
    return [
        *(claim for arm in gated for claim in _of_arm(figures, arm)),
        *_sweep(figures),
        *(claim for arm in budgets for claim in _rivals(figures, arm)),
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


def _rivals(figures: ByArm, arm: str) -> Iterator[Claim]:
    for key, rival in RIVALS.items():
        yield from _below(arm, f"executed, below {rival} at equal FLOPs (in every seed)", values(figures, arm, key))


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
