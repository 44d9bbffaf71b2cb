"""Verdicts on the claims of the paper on Token-Selective Attention, each by its interval over seeds.

The text of a claim states its limit. Differences are between runs of one seed, in nats.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace

from skipstone_studies.claims import ByArm, Claim, judge, mean, paired_differences, values
from skipstone_studies.headroom import Headroom, headroom
from skipstone_studies.quality.tsa.equal_flops import EXECUTED, RIVALS, blocks_of
from skipstone_studies.quality.tsa.published import JITTER, SHAKESPEARE

SOFT = "evaluation.ways.oracle.loss"
REALLY = 0.9  # share of a claimed saving that must be realised


def depth_pays(figures: ByArm) -> Headroom | None:
    """Return by how much the dense model's loss is below that of the best dense model of fewer blocks.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. The
    result has `full` and `rival` (names of both models), `gain` (difference of mean losses, in nats) and `interval`
    (over seeds); it is None if the dense model or all shallower ones are missing.
    """
    return headroom(figures, "dense", [arm for arm in figures if arm.startswith("dense-")], EXECUTED)


def language(figures: ByArm) -> list[Claim]:
    """Return the claims of the studies on text with their verdicts.

    They are about softly trained gates (savings, losses, and whether gates choose better than chance), about the sweep
    over lambda (the coefficient of the penalty on open gates), and about arms that skip tokens in training. figures:
    the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    gated = [arm for arm in figures if mean(figures, arm, "variants.one") is not None]
    budgets = [arm for arm in figures if arm.startswith("hard=")]
    return [
        *(claim for arm in gated for claim in _of_arm(figures, arm)),
        *_sweep(figures),
        *(claim for arm in budgets for claim in _rivals(figures, arm)),
    ]


def _of_arm(figures: ByArm, arm: str) -> Iterator[Claim]:
    claimed, skipped = (values(figures, arm, key) for key in ("claimed", "skipped"))
    start = mean(figures, arm, "variants.at_start")
    if start is not None and claimed:
        text = f"at least {REALLY:.0%} of the claimed saving is skipped (skipped - {REALLY:.0%} of claimed)"
        rest = [really - REALLY * said for really, said in zip(skipped, claimed, strict=True)]
        told = f"{statistics.fmean(skipped):.1%} of {statistics.fmean(claimed):.1%}: "
        yield from judge(arm, text, rest, least=0.0, form="+.1%", told=told)
        text = "the claimed saving exceeds that of the start bias before training (claimed - before)"
        more = [said - start for said in claimed]
        told = f"{statistics.fmean(claimed):.1%}, before {start:.1%}: "
        yield from judge(arm, text, more, least=0.0, form="+.1%", told=told)
    for kind, key in (("soft", SOFT), ("executed", EXECUTED)):
        text = f"{kind} loss within {JITTER} nats of dense"
        yield from judge(arm, text, paired_differences(figures, arm, "dense", key), most=JITTER)
    chance = paired_differences(figures, arm, arm, "variants.one", "variants.random")
    yield from judge(arm, "skipping beats as many random tokens", chance, most=0.0)
    yield from _rivals(figures, arm)


def _rivals(figures: ByArm, arm: str) -> Iterator[Claim]:
    """Yield, for each kind of rival, the claim that an arm's executed loss is below the rivals' at equal FLOPs.

    The rivals are dense models of fewer blocks, random tokens and early exit. The verdict is "no headroom" if the dense
    models show that depth does not pay.
    """
    room = depth_pays(figures)
    for key, rival in RIVALS.items():
        found, blocks = values(figures, arm, key), blocks_of(figures.get(arm, {}), key)
        for claim in judge(arm, f"executed loss below that of {rival} at equal FLOPs", found, most=0.0, blocks=blocks):
            yield claim if room is None or room.there else replace(claim, verdict="no headroom")


def _sweep(figures: ByArm) -> Iterator[Claim]:
    allowed = SHAKESPEARE["lambda=0.1"]["loss"] - SHAKESPEARE["lambda=0"]["loss"] + JITTER
    for kind, key in (("soft", SOFT), ("executed", EXECUTED)):
        text = f"{kind} loss within {allowed:.3f} nats of lambda 0"
        yield from judge("lambda=0.1", text, paired_differences(figures, "lambda=0.1", "lambda=0", key), most=allowed)
