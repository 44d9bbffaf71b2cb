"""A study of Token-Selective Attention on a task in which it is known which tokens need depth.

Gates are trained soft (they scale updates) or hard (they skip tokens).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from skipstone.data.synthetic import BINS
from skipstone.measure.losses import OVERALL
from skipstone.model.released import tsa
from skipstone_studies import gates
from skipstone_studies.claims import ArmComparison, as_claims, comparisons
from skipstone_studies.quality import reset_s3
from skipstone_studies.quality.reset_s3 import gate
from skipstone_studies.quality.tsa.recipes import ALONE, CONSTANT, HARD, LEARNED
from skipstone_studies.study import Column, Figures, RecipeDict, Study

BLOCKS = reset_s3.BLOCKS
DENSE = reset_s3.DENSE
JUDGED = ("tsa-soft", "tsa-hard", "tsa-hard-kept", "tsa-random")
# Laptop batches are smaller than in Reset-S3's own table, because soft gates compute every block for every token.
SIZES = {
    "laptop": {**reset_s3.SIZES["laptop"], "batch_size": 16, "steps": 1500},
    "paper": reset_s3.SIZES["paper"],
}
SEEDS = {"laptop": (0, 1, 2), "paper": (0, 1, 2)}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: dense models, and models with gates that are trained or choose tokens differently.

    Each is a dict of settings that makes one of the compared models. Gates are trained soft (scaling updates) or hard
    (skipping tokens); two controls keep random tokens, or exactly those that the corpus marks as needing depth. scale:
    "laptop" or "paper".
    """
    make = partial(reset_s3.recipe, SIZES[scale], corpus="switched-s3")
    quarter = {"capacity": reset_s3.CAPACITY}
    return {
        **{f"dense-{blocks}": make(blocks) for blocks in DENSE[scale]},
        "tsa-soft": make(BLOCKS, [gate(depth_weight=tsa.SYNTHETIC)]),
        "tsa-hard": make(BLOCKS, [gate(**HARD, **LEARNED, **quarter)]),
        "tsa-hard-kept": make(BLOCKS, [gate(**HARD, **LEARNED, **ALONE, **quarter)]),
        "tsa-random": make(BLOCKS, [gate(**HARD, **CONSTANT, **quarter, decision="random")]),
        "tsa-forced": make(BLOCKS, [gate(**HARD, **CONSTANT, **ALONE)], routing="difficulty"),
    }


def measured(folder: Path) -> Figures:
    """Return the figures of one run: accuracy by difficulty, FLOPs, and claimed and realised savings.

    folder: the run folder. Keys: `training` and `evaluation`, the content of result.json and of `skipstone eval
    --json`; `accuracy`, the share of correct operations by bin of difficulty (operations since the last reset);
    `flops`, counted per token; `alpha`, mean weight of the gates in the soft pass of training; `claimed` and `skipped`,
    shares of (token, block) pairs that this weight counts as saved and that the pass representing the model (executed,
    if possible) skips; `gap`, loss of the pass that skips minus that of the soft pass, in nats.
    """
    figures = reset_s3.measured(folder)
    return {**figures, **gates.savings(figures["evaluation"])}


TASK = (
    "Switched-S3: an earlier switch decides whether a symbol is an operation or a filler, so no symbol reveals by "
    "itself what it needs."
)
ABOUT = (
    "One entry in four is an operation, and it needs more depth the more operations have passed since a reset (the "
    "bins). Figures are those of the pass that skips unless they say *soft*. In arms with gates, the first two of 8 "
    "blocks are dense.\n\n* *tsa-soft* is Token-Selective Attention as published, with lambda 0.01, executed hard.\n* "
    "*tsa-hard* keeps a quarter of the tokens and is trained as it is executed, with gates that learn from the "
    "gradient at the block's output.\n* *tsa-random* keeps a quarter of the tokens at random; *tsa-forced* keeps "
    "exactly the operations.\n* Skipped tokens provide keys and values except in *tsa-hard-kept* and *tsa-forced*."
    "\n\n*Headroom captured* is (arm - dense) / (forced - dense) in accuracy, where the dense accuracy is interpolated "
    "between the dense arms at the arm's executed FLOPs. Forced decisions also drop the switches and were not tuned, "
    "so they are not an upper bound. At laptop scale there is no dense arm with all 8 blocks, so the loss of skipping "
    "relative to it is unknown."
)
COLUMNS = (
    Column(key="flops", title="MFLOPs/token", format=".3f", unit=1e6),
    Column(key="claimed", title="saved by the paper's metric", format=".1%"),
    Column(key="skipped", title="token-layers skipped", format=".1%"),
    Column(key=f"evaluation.ways.oracle.accuracy.{OVERALL}", title="accuracy, all, soft", format=".1%", better="high"),
    Column(key=f"accuracy.{OVERALL}", title="accuracy, all", format=".1%", better="high"),
    *(Column(key=f"accuracy.{name}", title=f"accuracy {name}", format=".1%", better="high") for name in BINS),
    Column(key="headroom.4-7", title="headroom captured, 4-7", format=".2f"),
    Column(key=f"headroom.{OVERALL}", title="headroom captured, all", format=".2f"),
)

COMPARED = ArmComparison(
    key=f"accuracy.{OVERALL}", title="accuracy, all", against="tsa-random", arms=JUDGED, format="+.1%", better="high"
)

TSA_SWITCHED_S3 = Study(
    name="tsa_switched_s3",
    purpose="Token-Selective Attention where no symbol reveals by itself what it needs: do the gates find it?",
    about=f"{TASK} {ABOUT}",
    arms=arms,
    seeds=SEEDS,
    measure=measured,
    measure_together=None,
    derive=partial(reset_s3.captured, judged=JUDGED, knowing="tsa-forced"),
    claims=partial(as_claims, compared=[COMPARED]),
    details=partial(comparisons, compared=[COMPARED]),
    columns=COLUMNS,
)
