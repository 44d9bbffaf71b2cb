"""Does routing beat narrow dense models of any depth at equal training FLOPs, after a training of a few minutes?

`decisive` and `decisive_narrow` compare models that skip with a dense model of as many blocks, which is not the best
dense model for these FLOPs. Here the reference is the best of several depths, chosen on validation text.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

from skipstone_studies import protocol_page as pages
from skipstone_studies.claims import ByArm, Claim, paired_differences
from skipstone_studies.quality import decisive, depth
from skipstone_studies.study import RecipeDict

DEPTHS = (3, 4, 5)  # blocks of the dense models
SAME_TEXT = f"dense-{decisive.BLOCKS}-same-text"
FIXED = "boundary"  # the arm by whose text SAME_TEXT is measured
ROUTED = (FIXED, decisive.CHANCE, "raw-ema", "chunks", "benefit")
SIZES: dict[str, tuple[int, float]] = {"laptop": (32, 1e13), "quick": (16, 2e9)}  # width and training FLOPs


def arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the recipes by name: dense models of 3, 4 and 5 blocks, and models of 8 blocks that skip.

    All have equal training FLOPs, except for a dense model of 8 blocks that is trained for as many steps as the model
    that skips by boundaries of words, to show what eight blocks for every byte gain after the same text. scale:
    "laptop" or "quick". corpus: name of the text, as in data.corpus.
    """
    width, budget = SIZES[scale]
    recipe = partial(depth.arm, scale, corpus, width=width)
    routed = {name: recipe(decisive.BLOCKS, budget=budget, mechanisms=[decisive.ROUTED[name]]) for name in ROUTED}
    dense = {f"dense-{blocks}": recipe(blocks, budget=budget) for blocks in DEPTHS}
    steps, full = routed[FIXED]["train"]["steps"], recipe(decisive.BLOCKS, budget=budget)["train"]["steps"]
    return {**dense, **routed, SAME_TEXT: recipe(decisive.BLOCKS, budget=budget * steps / full)}


def best_dense(figures: ByArm) -> str | None:
    """Return the dense model of 3 to 5 blocks with the lowest validation loss; None if none has run.

    The others are compared, as means over the seeds that both have, with the one that has most seeds, because seeds
    differ by more than depths do. figures: the figures of every run, {arm (compared recipe): {seed: nested dict}}.
    """
    names = _dense(figures)
    if not names:
        return None
    most = max(names, key=lambda name: len(figures[name]))
    gaps = {name: paired_differences(figures, name, most, "validation_loss") for name in names}
    found = {name: statistics.fmean(each) for name, each in gaps.items() if each}
    return min(found, key=found.__getitem__)


def claims(figures: ByArm) -> Iterator[Claim]:
    """Yield two claims on each model's test loss, with verdicts: against the best dense model, and random tokens.

    The claims are that the loss is at least .02 nats per byte below that of the best dense model, which is chosen on
    validation text, and below that of the model that keeps random tokens. The verdict is "no headroom" if a model with
    eight blocks for every byte, after the same text, is not .02 nats better than the best dense model. figures: the
    figures of every run, {arm (compared recipe): {seed: nested dict}}.
    """
    if (best := best_dense(figures)) is not None:
        compared = {arm: seeds for arm, seeds in figures.items() if arm != SAME_TEXT}
        yield from pages.claims(compared, pages.room_of(figures, SAME_TEXT, [best]), (best, decisive.CHANCE))


def details(figures: ByArm) -> str:
    """Return the Markdown below the table: what depth gains, differences between arms, and learning rates.

    What depth gains is the test loss of the best dense model of 3 to 5 blocks minus that of a dense model of 8 blocks,
    all of which process every byte. figures: the figures of every run, {arm (compared recipe): {seed: nested dict}}.
    """
    if (best := best_dense(figures)) is None:
        return ""
    room = pages.room_of(figures, SAME_TEXT, [best])
    parts = [
        f"The best dense model by validation loss is {best}.",
        pages.headroom_text(room, SAME_TEXT, [best]),
        pages.length(figures, FIXED),
        *(pages.differences(figures, name, room is None or not room.there) for name in (best, FIXED, decisive.CHANCE)),
        pages.NOTE,
        pages.rates(figures),
    ]
    return "\n\n".join(part for part in parts if part)


def _dense(figures: ByArm) -> list[str]:
    return [name for name in (f"dense-{blocks}" for blocks in DEPTHS) if figures.get(name)]


DECISIVE_SHORT = replace(
    decisive.DECISIVE,
    name="decisive_short",
    purpose="does routing beat the best narrow dense model at equal training FLOPs, after a short training?",
    about=(
        decisive.EQUAL + "They are byte models of width 32 with one head, trained in fp32 in steps of 2,048 bytes. The "
        "models that skip have 8 blocks. A dense model of as many blocks is not the best one for these FLOPs "
        "([depth](depth.md)), so the reference is the best dense model of 3, 4 and 5 blocks, chosen by validation "
        "loss; one of 4 blocks costs about as much per byte as a model that skips. What routing can gain at most is "
        f"told by *{SAME_TEXT}*: 8 blocks for every byte, trained for as many steps as *{FIXED}*, which takes "
        "1.8 times the FLOPs. The learning rate was tuned for each arm on runs of "
        f"{depth.LONGEST_TUNING:.1e} FLOPs and falls to 0; the weights of the last tenth of the steps are averaged. "
        "The text is that of [decisive](decisive.md).\n\n" + decisive.CONTROL
    ),
    arms=arms,
    seeds={"laptop": (0, 1, 2, 3), "quick": (0,)},
    claims=claims,
    details=details,
)
