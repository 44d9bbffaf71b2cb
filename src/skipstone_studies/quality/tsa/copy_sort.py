"""The study of copy and sort, the synthetic tasks of the Token-Selective Attention paper (arXiv 2605.05222).

Accuracies are measured in soft passes, which only scale updates, and in executed ones, which skip; `accuracy` is the
share of correct tokens in the answer. At scale "paper", we follow the paper's released code where the text says nothing
or something else: a row has 20 symbols (not stated in the text), hence 42 tokens with separator, answer and end, of the
64 that the model could take, and the training 390 steps (10,000 in the text). Unlike the paper, which has 10,000 rows
and reads them ten times, we draw rows anew at every step.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from skipstone.core.strict import PlainDict
from skipstone.model.released import tsa
from skipstone_studies import gates, measure
from skipstone_studies.claims import (
    ByArm,
    Claim,
    PublishedColumn,
    beside,
    claims_table,
    judge,
    paired_differences,
    values,
)
from skipstone_studies.quality.tsa import published as paper
from skipstone_studies.quality.tsa.recipes import SEEDS, gated, recipe
from skipstone_studies.quality.tsa.text import ways_to_execute
from skipstone_studies.study import Column, Figures, RecipeDict, Study

TASKS = ("copy", "sort")
SIZES: dict[str, PlainDict] = {
    "laptop": {
        "model": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4},
        "symbols": 10,
        "train": {"steps": 800, "batch_size": 64, "learning_rate": 2e-3, "warmup_steps": 40},
    },
    "paper": {
        "model": {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 6, "num_attention_heads": 4},
        "symbols": 20,
        "train": {"steps": 390, "batch_size": 256, "learning_rate": 3e-4, "warmup_steps": 0},
    },
}
FEW = (1, 2)  # blocks of further dense models, which show how much depth the task needs
POINT = 0.01  # accuracy differences up to this count as none


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: for copy and sort, a dense model, one with gates, and dense ones of 1 and 2 blocks.

    Each is a dict of settings that makes one of the compared models. scale: "laptop" or "paper".
    """
    size = SIZES[scale]
    model = {"max_position_embeddings": 64, **size["model"]}
    found: dict[str, RecipeDict] = {}
    for task in TASKS:
        make = partial(recipe, data=_data(task, size["symbols"]), train=size["train"])
        found[f"{task}-dense"] = make(model, mechanisms=[])
        found[f"{task}-tsa"] = make(model, mechanisms=gated(tsa.SYNTHETIC))
        for blocks in FEW:
            found[f"{task}-dense-{blocks}"] = make({**model, "num_hidden_layers": blocks}, mechanisms=[])
    return found


def _data(task: str, symbols: int) -> PlainDict:
    return {"corpus": task, "context": 2 * symbols + 2, "validation_rows": 1000}


def measured(folder: Path) -> Figures:
    """Return the figures of one run: training, evaluation, savings, and losses of other passes.

    folder: the run folder. Keys: `training` and `evaluation`, the content of result.json and of `skipstone eval
    --json`; `alpha`, mean weight of the gates in the soft pass; `claimed` and `skipped`, shares of (token, block) pairs
    that this weight counts as saved and that the pass representing the model (executed, if possible) skips; `gap`, loss
    of the pass that skips minus that of the soft pass, in nats; `variants`, by name the losses of the gated model when
    it is run in other ways.
    """
    figures = measure.standard(folder)
    return {**figures, **gates.savings(figures["evaluation"]), "variants": gates.variants(folder)}


def claims(figures: ByArm) -> list[Claim]:
    """Return the claims about both tasks with their verdicts, on the gated models.

    They are: the accuracy of the soft and of the executed pass is at most 1 percentage point below the dense model's;
    at least 90 % of the saving by the metric of arXiv 2605.05222 is really skipped; the executed accuracy is more than
    1 percentage point above that of dense models of 1 and 2 blocks. figures: the figures of every run, {arm: {seed:
    nested dict}}, where an arm is one of the compared recipes.
    """
    return [claim for task in TASKS for claim in _of_task(figures, task)]


def _of_task(figures: ByArm, task: str) -> Iterator[Claim]:
    arm, dense = f"{task}-tsa", f"{task}-dense"
    for kind, key in (("soft", SOFT), ("executed", EXECUTED)):
        kept = paired_differences(figures, arm, dense, key, SOFT)
        yield from judge(arm, f"{kind} accuracy within {POINT:.0%} of dense", kept, least=-POINT, form="+.1%")
    claimed, skipped = (values(figures, arm, key) for key in ("claimed", "skipped"))
    rest = [really - 0.9 * said for really, said in zip(skipped, claimed, strict=True)]
    if rest:
        text = "at least 90% of the claimed saving is skipped (skipped - 90% of claimed)"
        told = f"{statistics.fmean(skipped):.1%} of {statistics.fmean(claimed):.1%}: "
        yield from judge(arm, text, rest, least=0.0, form="+.1%", told=told)
    for blocks in FEW:
        text = f"executed accuracy more than {POINT:.0%} above a dense model of {blocks} block{'s' * (blocks > 1)}"
        more = paired_differences(figures, arm, f"{dense}-{blocks}", EXECUTED, SOFT)
        yield from judge(arm, text, more, least=POINT, form="+.1%")


def details(figures: ByArm) -> str:
    """Return the Markdown below the study's table: verdicts, the paper's figures and ours, other ways to run gates.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    parts = (
        claims_table("Which claims hold", claims(figures)),
        beside("Comparison with the paper", figures, paper.COPY_SORT, BESIDE, SOURCE),
        ways_to_execute(figures),
    )
    return "\n\n".join(part for part in parts if part)


SOFT, EXECUTED = "evaluation.ways.oracle.token_accuracy", "evaluation.ways.executed.token_accuracy"
SOURCE = (
    "Paper: arXiv 2605.05222, one seed, width 128, 6 blocks, batches of 256. Ours: the sizes of this scale, 1,000 "
    "rows that are not in the training data."
)
BESIDE = (
    PublishedColumn(title="accuracy, soft", key=SOFT, published="accuracy", format=".2%"),
    PublishedColumn(title="alpha", key="alpha", published="alpha"),
    PublishedColumn(title="saved by the paper's metric", key="claimed", published="saved", format=".1%"),
    PublishedColumn(title="skipped", key="skipped", format=".1%"),
)
TSA_COPY_SORT = Study(
    name="tsa_copy_sort",
    purpose="Token-Selective Attention on copy and sort: accuracy, soft and executed",
    about=(
        "A row holds n symbols, a separator, and the symbols again, in the same order or sorted. *Soft* is the pass "
        "as in training, which computes everything. *Executed* skips tokens whose gate is at most one half and gives "
        "the others gain 1, as the paper's sparse mode does. Accuracy is measured on the tokens of the answer."
    ),
    arms=arms,
    seeds=SEEDS,
    measure=measured,
    measure_together=None,
    claims=claims,
    details=details,
    columns=(
        Column(key=SOFT, title="accuracy, soft", format=".2%", better="high"),
        Column(key=EXECUTED, title="accuracy, executed", format=".2%", better="high"),
        Column(key="claimed", title="saved by the paper's metric", format=".1%"),
        Column(key="skipped", title="token-layers skipped", format=".1%"),
        Column(key="evaluation.flops_per_token.counted", title="MFLOPs/token", format=".3f", unit=1e6),
    ),
)
