"""Studies of whether there is anything to route: what depth gains, and how much each block lowers each token's loss.

Depth is compared at equal FLOPs and at equal data.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from skipstone.adapt.source import load_dense, tokenizer_of
from skipstone.core.strict import PlainDict
from skipstone.data.config import DataConfig
from skipstone.data.prepare import PreparedData, prepare
from skipstone.data.rows import Row
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run
from skipstone_studies import benefit_page, protocol
from skipstone_studies import protocol_page as pages
from skipstone_studies.adapting import sampled_text, source_path
from skipstone_studies.benefit import Unit, oracle
from skipstone_studies.claims import ByArm, Claim, judge, paired_differences
from skipstone_studies.headroom import LEAST
from skipstone_studies.quality import decisive
from skipstone_studies.quality.decisive import FULL, RIVAL
from skipstone_studies.study import Column, Figures, RecipeDict, Study
from skipstone_studies.text_loss import spaced

SAME_TEXT = "dense-5-same-text"
ROWS = {"laptop": 48, "paper": 256, "quick": 8}  # half to fit the regression, half to measure
ALONE = 6  # blocks of a deep model that are measured alone
CHECKPOINT = "SKIPSTONE_CHECKPOINT"  # the folder of a user's own checkpoint
ORACLE = "benefit"


def arms(scale: str, corpus: str = "distinct:python-code") -> dict[str, RecipeDict]:
    """Return the recipes of dense models by name: 8 blocks, 5 with equal training FLOPs, and 5 on the same text.

    Each is a dict of settings that makes one of the compared models. scale: "laptop", "paper" or "quick". corpus: name
    of the text.
    """
    recipe = partial(decisive.arm, scale, corpus)
    full, rival = recipe(decisive.BLOCKS), recipe(5)
    same = recipe(5, budget=full["train"]["steps"] / rival["train"]["steps"])
    same["train"] |= protocol.lengths(full["train"]["steps"])
    return {FULL: full, RIVAL: rival, SAME_TEXT: same}


def measured(folder: Path) -> Figures:
    """Return the figures of one run; those of the model of 8 blocks include the benefit of each block.

    The benefit of a block for a token is the number of nats by which it lowers the token's loss. folder: the run
    folder. Keys: those of `protocol.measured`, such as `loss` (nats per byte on the test split), `training_flops`, and
    `tuning` (of the learning rate); for 8 blocks also `benefit`, measured on the test split: `loss`, numbers of
    predictions, and `units`, a list with the values of each set of blocks, such as `blocks`, `removed` (the loss
    without them) and `mean_benefit` in nats.
    """
    figures = protocol.measured(folder)
    if folder.name.rpartition("-seed")[0] != FULL:
        return figures
    data = protocol.data_of(protocol.recipe_of(folder)["data"], "test")
    return {**figures, ORACLE: on_rows(Run(folder).load_model(), data, ROWS[folder.parent.name])}


def units_of(blocks: int) -> list[Unit]:
    """Return the sets of blocks that are skipped to measure how much they lower each token's loss.

    The first set is the middle half of the blocks, which are skipped together; it is left out if it is a single block.
    The others are single blocks: every one, or in a model of 12 blocks or more every (blocks // 6)-th. A set is a tuple
    of indices. blocks: number of blocks of the model.
    """
    quarter = max(1, blocks // 4)
    middle = tuple(range(quarter, blocks - quarter))
    return [*([middle] if len(middle) > 1 else []), *((i,) for i in range(0, blocks, max(1, blocks // ALONE)))]


def on_rows(
    model: SkipstoneForCausalLM,
    data: PreparedData,
    count: int,
    marks: Mapping[str, Callable[[Sequence[Row]], Tensor]] | None = None,
) -> PlainDict:
    """Measure how much blocks of a dense model lower each token's loss, on evenly spaced rows.

    model: a dense model. data: prepared text, whose `validation` is read. count: number of rows. marks: further ways to
    choose tokens by name, functions that return a bool mask of the tokens of rows. A regression that predicts the
    benefit is fitted to every second row and judged on the others. Keys of the result: `loss` in nats per prediction;
    `predictions` and `fit_predictions`, numbers of labels; `repeats`, over how many random halves of the tokens a
    benefit is averaged; `units`, for each set of blocks a dict of `blocks`, `removed` (the loss without them),
    `mean_benefit` in nats, `explained` (the share of the benefit's variance that the regression predicts),
    `correlation` (of each score of tokens with the benefit) and `kept`, the losses if the blocks update only the tokens
    with the highest scores.
    """
    rows = data.validation.__getitems__(spaced(len(data.validation), count))
    marked = {name: mark(rows[1::2]) for name, mark in (marks or {}).items()}
    return oracle(model, rows[::2], rows[1::2], units_of(model.config.num_hidden_layers), marked=marked)


def claims(figures: ByArm) -> Iterator[Claim]:
    """Yield the claims that the test loss of 8 blocks is at least .02 nats per byte below that of 5, with verdicts.

    One is at equal training FLOPs, the other on the same text. figures: the figures of every run, {arm: {seed: nested
    dict}}, where an arm is one of the compared recipes.
    """
    for rival, what in ((RIVAL, "at equal training FLOPs"), (SAME_TEXT, "on the same text")):
        found = paired_differences(figures, rival, FULL, pages.LOSS)
        text = f"test loss at least {LEAST} nats below {rival} {what}"
        yield from judge(FULL, text, found, least=LEAST, form="+.4f")


def details(figures: ByArm) -> str:
    """Return the Markdown below the table: gains by depth, differences, learning rates, and the benefit of blocks.

    A gain by depth is by how much the deeper model's loss is lower; the benefit of a block for a token, by how many
    nats it lowers the token's loss. figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one
    of the compared recipes.
    """
    seeds = figures.get(FULL, {})
    found = next((of_seed[ORACLE] for of_seed in seeds.values() if ORACLE in of_seed), None)
    parts = [
        pages.headroom_text(pages.room_of(figures, FULL, [RIVAL]), FULL, [RIVAL]),
        pages.length(figures, FULL),
        pages.differences(figures, FULL, refused=False),
        pages.NOTE,
        pages.rates(figures),
        "" if found is None else benefit_page.tables(found, FULL),
        "" if found is None else benefit_page.NOTE,
        "The command that goes on: `skipstone reproduce headroom --scale paper`, 1e14 FLOPs a run.",
    ]
    return "\n\n".join(part for part in parts if part)


HEADROOM = Study(
    name="headroom",
    purpose="does depth pay on this text, and could a router know which tokens need a block?",
    about=(
        "Before any router is judged, the model of 8 blocks must beat the one of 5 by .02 nats: at equal training "
        "FLOPs, where the smaller one reads more text; and on the same text (*same-text*), where it costs less. The "
        "protocol is that of [decisive](decisive.md). Then each block of the trained model is asked which tokens it "
        "helps.\n\n" + pages.COLUMNS_NOTE
    ),
    arms=arms,
    seeds=decisive.SEEDS,
    columns=decisive.COLUMNS,
    make=protocol.tuned_run,
    measure=measured,
    measure_together=None,
    claims=claims,
    details=details,
)


def checkpoints(scale: str) -> dict[str, RecipeDict]:
    """Return recipes by name, each with a pretrained checkpoint and the text on which its blocks are measured.

    scale: "laptop", "paper" or "quick"; the last reads fewer rows of the text.
    """
    rows = {"rows": 16 if scale == "quick" else 64}
    few = {"rows": 16 if scale == "quick" else 24}  # 2,268 passes of a row
    stories = {"tokens": 2_000 if scale == "quick" else 20_000, "length": 200}
    return {
        "stories260K": {"source": "stories260K", "context": 192, "sampled": stories, **rows},
        "SmolLM2-135M": {"source": "SmolLM2-135M-Instruct", "context": 256, "corpus": "wikitext-2", **few},
        "your checkpoint": {"source": CHECKPOINT, "context": 256, "corpus": "wikitext-2", **few},
    }


def of_checkpoint(recipe: RecipeDict) -> Figures:
    """Return by how much a pretrained checkpoint's blocks lower each token's loss: {"benefit": measured values}.

    The values are `loss` in nats per prediction, numbers of predictions, and `units`, a list with a dict for each set
    of blocks: `blocks`, `removed` (the loss without them), `mean_benefit` and others. recipe: an entry of `checkpoints`
    with a seed: its `source` names the checkpoint, its `corpus` the text; without `corpus`, the checkpoint generates
    the text. Raises FileNotFoundError for a checkpoint that does not exist.
    """
    path = _path(recipe["source"])
    model = load_dense(path)
    tokenizer = tokenizer_of(path, model)
    with tempfile.TemporaryDirectory() as place:
        corpus, split = recipe.get("corpus"), "test"
        if corpus is None:
            folder = sampled_text(path, Path(place, "text"), seed=recipe["seed"], **recipe["sampled"])
            corpus, split = f"text:{folder}", "train"
        config = DataConfig(corpus=corpus, context=recipe["context"])
        data = prepare(config, tokenizer=tokenizer, train=False, split=split)
        return {ORACLE: on_rows(model, data, recipe["rows"])}


def _path(name: str) -> str:
    if name != CHECKPOINT:
        return source_path(name)
    if not os.environ.get(CHECKPOINT):
        raise FileNotFoundError(f"{CHECKPOINT} must name the folder of a checkpoint")
    return os.environ[CHECKPOINT]


def checkpoint_details(figures: Mapping[str, Mapping[int, Figures]]) -> str:
    """Return Markdown tables of how much blocks lower each token's loss, for each checkpoint's first seed.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    parts = [benefit_page.tables(seeds[min(seeds)][ORACLE], arm) for arm, seeds in figures.items() if seeds]
    return "\n\n".join([*parts, benefit_page.NOTE])


HEADROOM_PRETRAINED = Study(
    name="headroom_pretrained",
    purpose="could a router know which tokens need a block of a pretrained checkpoint?",
    about=(
        "The benefit of each block for each token of checkpoints that were trained to the end. stories260K reads "
        "stories that it has written itself; SmolLM2-135M and the checkpoint whose folder SKIPSTONE_CHECKPOINT names "
        "read the test split of wikitext-2. Nothing is trained."
    ),
    arms=checkpoints,
    seeds={"laptop": (0,), "quick": (0,)},
    columns=(
        Column(key=f"{ORACLE}.loss", title="loss, nats a token", format=".4f"),
        Column(key=f"{ORACLE}.predictions", title="held-out tokens", format=",d"),
    ),
    clock=of_checkpoint,
    details=checkpoint_details,
)
