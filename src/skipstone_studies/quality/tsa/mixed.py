"""A study of Token-Selective Attention on text with spans of a task: where depth goes, and what the text loses.

The spans are a synthetic task of operations, which need depth, and fillers, which do not.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.measure.losses import OVERALL
from skipstone.model.released import tsa
from skipstone_studies import gates
from skipstone_studies.claims import ByArm, Claim, claims_table, judge, values
from skipstone_studies.headroom import headroom
from skipstone_studies.quality import reset_s3
from skipstone_studies.quality.reset_s3 import gate
from skipstone_studies.quality.tsa.recipes import ALONE, CONSTANT, HARD, LEARNED
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SIZES: dict[str, PlainDict] = {
    "laptop": {"hidden_size": 64, "num_attention_heads": 4, "steps": 800, "batch_size": 8, "rate": 2e-3, "blocks": 6},
    "paper": {
        "hidden_size": 256,
        "num_attention_heads": 8,
        "steps": 20000,
        "batch_size": 64,
        "rate": 1e-3,
        "blocks": 8,
    },
}
SEEDS = {"laptop": (0, 1, 2), "paper": (0, 1, 2)}
CAPACITIES = (0.25, 0.5)
TEXT, WORK = "kinds.text.loss", f"accuracy.{OVERALL}"
NEAR, DEEPER = 0.005, 2.0  # largest relative text loss; least depth of operations as a multiple of the text's


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: dense models, gates trained soft (scaling updates) or hard (skipping), random tokens.

    Each is a dict of settings that makes one of the compared models. scale: "laptop" or "paper".
    """
    size = SIZES[scale]
    make = partial(_recipe, size)
    learned = {f"tsa-hard={share:g}": gate(**HARD, **LEARNED, capacity=share) for share in CAPACITIES}
    alone = {f"tsa-hard-kept={share:g}": gate(**HARD, **LEARNED, **ALONE, capacity=share) for share in CAPACITIES}
    drawn = {
        f"tsa-random={share:g}": gate(**HARD, **CONSTANT, capacity=share, decision="random") for share in CAPACITIES
    }
    return {
        **{f"dense-{blocks}": make(blocks) for blocks in (size["blocks"], size["blocks"] // 2)},
        "tsa-soft": make(size["blocks"], [gate(depth_weight=tsa.LANGUAGE)]),
        **{arm: make(size["blocks"], [mechanism]) for arm, mechanism in {**learned, **alone, **drawn}.items()},
    }


def _recipe(size: PlainMapping, blocks: int, mechanisms: list[PlainDict] | None = None) -> RecipeDict:
    recipe = reset_s3.recipe(size, blocks, mechanisms)
    return {**recipe, "data": {"corpus": "mixed:python-stdlib", "context": 256, "validation_rows": 1024}}


def measured(folder: Path) -> Figures:
    """Return the figures of one run, with losses and depths of the executed pass by kind of token.

    folder: the run folder. Keys: `training` and `evaluation`, the content of result.json and of `skipstone eval
    --json`; `accuracy`, the share of correct operations by bin of difficulty (operations since the last reset);
    `flops`, counted per token; `alpha`, mean weight of the gates in the soft pass of training; `claimed` and `skipped`,
    shares of (token, block) pairs that this weight counts as saved and that the pass representing the model (executed,
    if possible) skips; `gap`, loss of the pass that skips minus that of the soft pass, in nats; `kinds`, {"text",
    "operations" or "fillers": {"loss" in nats per prediction, "depth": mean number of blocks that update a token}};
    `deeper`, the depth of operations divided by that of text.
    """
    figures = reset_s3.measured(folder)
    evaluation = figures["evaluation"]
    kinds = evaluation["ways"][evaluation["main"]]["kinds"]
    deeper = kinds["operations"]["depth"] / kinds["text"]["depth"]
    return {**figures, **gates.savings(evaluation), "kinds": kinds, "deeper": deeper}


def text_cost(figures: Mapping[str, Figures]) -> dict[str, Figures]:
    """Return for each arm `text_cost`: its loss on text divided by that of the deepest dense arm, minus 1.

    figures: the figures of each arm (compared recipe) with one seed, by arm. The result is {} without dense arms.
    """
    dense = next((found for arm, found in figures.items() if arm.startswith("dense-")), None)
    if dense is None:
        return {}
    reference = dense["kinds"]["text"]["loss"]
    return {arm: {"text_cost": found["kinds"]["text"]["loss"] / reference - 1} for arm, found in figures.items()}


def claims(figures: ByArm) -> list[Claim]:
    """Return two claims for each gated arm with their verdicts, on the cost for text and on where the depth goes.

    They are: the loss on text is at most .5 % above the dense model's; operations are at least twice as deep as text,
    where depth is the mean number of blocks that update a token. figures: the figures of every run, {arm: {seed: nested
    dict}}, where an arm is one of the compared recipes.
    """
    found: list[Claim] = []
    for arm in (arm for arm in figures if arm.startswith("tsa")):
        cost, deeper = values(figures, arm, "text_cost"), values(figures, arm, "deeper")
        found += judge(arm, f"loss on text within {NEAR:.1%} of dense", cost, most=NEAR, form="+.2%")
        found += judge(
            arm, f"depth of operations at least {DEEPER:g} times the depth of text", deeper, least=DEEPER, form=".2f"
        )
    return found


def details(figures: ByArm) -> str:
    """Return the Markdown below the table: verdicts on the text's loss and on where depth goes, and what depth gains.

    What depth gains is by how much the dense model's loss on text is below that of shallower ones. figures: the figures
    of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    dense = [arm for arm in figures if arm.startswith("dense-")]
    room = headroom(figures, dense[0], dense[1:], TEXT) if dense else None
    parts = (claims_table("Targets", claims(figures)), "" if room is None else f"On text: {room.sentence()}")
    return "\n\n".join(part for part in parts if part)


TSA_MIXED = Study(
    name="tsa_mixed",
    purpose="Text with spans of Switched-S3: is depth spent on the operations, and what does the text lose?",
    about=(
        "Half of the windows of 256 bytes contain a span of 32 entries of Switched-S3. All figures are those of the "
        "pass that skips. *Depth* is the number of blocks that update a token. *tsa-hard* is trained as it is "
        "executed and keeps the named share of tokens in every gated block, *tsa-hard-kept* without keys and values "
        "of the others; *tsa-random* keeps the same share of random tokens; *tsa-soft* is as published. The first two "
        "blocks are dense. If no arm, including the dense ones, gets many operations right, then the operations were "
        "not learned, and the depth that they receive says nothing."
    ),
    arms=arms,
    seeds=SEEDS,
    measure=measured,
    measure_together=None,
    derive=text_cost,
    claims=claims,
    details=details,
    columns=(
        Column(key="flops", title="MFLOPs/token", format=".3f", unit=1e6, relative=True),
        Column(key=TEXT, title="loss on text", format=".4f", better="low"),
        Column(key="text_cost", title="vs. the deepest dense", format="+.2%"),
        Column(key=WORK, title="accuracy on operations", format=".1%", better="high"),
        Column(key="kinds.text.depth", title="depth of text", format=".2f"),
        Column(key="kinds.operations.depth", title="depth of operations", format=".2f"),
        Column(key="deeper", title="operations / text", format=".2f"),
        Column(key="skipped", title="token-layers skipped", format=".1%"),
    ),
)
