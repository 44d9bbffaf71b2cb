"""What the studies of Token-Selective Attention on text share: the figures of a run, and the sections of a page.

The sections are claims, comparisons with the paper and at equal FLOPs, and losses of the same weights executed in other
ways.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from skipstone.evaluate.tables import Section, markdown
from skipstone_studies import gates, measure, text_blocks
from skipstone_studies.claims import ByArm, Published, PublishedColumn, beside, claims_table, values
from skipstone_studies.page import mean_and_spread
from skipstone_studies.quality.tsa import equal_flops, judged, overfitting
from skipstone_studies.quality.tsa import published as paper
from skipstone_studies.quality.tsa.recipes import SEEDS
from skipstone_studies.study import Column, Figures, Study
from skipstone_studies.timing import forward_speeds


def measured(folder: Path) -> Figures:
    """Return the figures of one run, with savings and losses of further ways to execute the model.

    folder: the run folder. Keys: `training` and `evaluation`, the content of result.json and of `skipstone eval
    --json`; `alpha`, mean weight of the gates in the soft pass of training; `claimed` and `skipped`, shares of (token,
    block) pairs that this weight counts as saved and that the pass representing the model (executed, if possible)
    skips; `gap`, loss of the pass that skips minus that of the soft pass, in nats; `variants`, by name the losses of
    gates that are executed in other ways; `exits`, figures of early exit by threshold; `stretches`, a list of losses by
    block of text; and `overfitting`, the course of the losses during training.
    """
    figures = measure.standard(folder)
    further = {
        "variants": gates.variants(folder),
        "exits": gates.exits(folder),
        text_blocks.RECORDED: text_blocks.block_losses(folder),
        overfitting.RECORDED: overfitting.measured(folder),
    }
    return {**figures, **gates.savings(figures["evaluation"]), **further}


def details(figures: ByArm, published: Published, corpus: str) -> str:
    """Return the Markdown below the study's table: verdicts, published figures next to ours, and further tables.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    published: the figures that the paper publishes, by arm. corpus: name of the corpus that the paper uses; on other
    texts its figures are left out, because losses cannot be compared.
    """
    room = judged.depth_pays(figures)
    parts = [claims_table("Which claims hold", judged.language(figures)), "" if room is None else room.sentence()]
    if published and _same_corpus(figures, corpus):
        parts.append(beside("Comparison with the paper", figures, published, _columns(figures), paper.SOURCE))
    return "\n\n".join(
        part
        for part in (
            *parts,
            overfitting.table(figures),
            equal_flops.intervals(figures),
            ways_to_execute(figures),
            exit_thresholds(figures),
        )
        if part
    )


def _columns(figures: ByArm) -> tuple[PublishedColumn, ...]:
    """Return the columns of the table beside the paper's figures.

    If the runs have the loss on random batches, which is how the paper measures it, that column comes first.
    """
    if not any(values(figures, arm, overfitting.RANDOM_BATCHES) for arm in figures):
        return BESIDE
    loss = PublishedColumn(
        title="loss, soft, 20 random batches", key=overfitting.RANDOM_BATCHES, published="loss", format=".4f"
    )
    return (loss, replace(BESIDE[0], title="whole validation split", published=""), *BESIDE[1:])


def _same_corpus(figures: ByArm, corpus: str) -> bool:
    read = {found["evaluation"].get("corpus", corpus) for seeds in figures.values() for found in seeds.values()}
    return all(name.split(":")[0] == corpus for name in read)


def ways_to_execute(figures: ByArm) -> str:
    """Return a Markdown table of losses of the same softly trained weights, executed in four ways; "" without any.

    Three skip equally many tokens: kept ones are scaled by their gate or by 1, or are random; the fourth skips none and
    replaces each gate by its block's mean. figures: the figures of every run, {arm: {seed: nested dict}}, where an arm
    is one of the compared recipes.
    """
    keys = ("gate", "one", "random", "constant")
    rows = [
        [arm, *(mean_and_spread(values(figures, arm, f"variants.{key}"), ".3f") for key in keys)]
        for arm in figures
        if values(figures, arm, "variants.one")
    ]
    note = (
        "Losses in nats of one set of weights, trained soft. The first three columns skip equally many tokens in each "
        "block: kept tokens are scaled by their gate 1 - p; or by 1, as in the paper's sparse mode; or the kept tokens "
        "are random, with gain 1. The last column skips nothing: each gate is replaced by the mean of its block."
    )
    columns = ["arm", "kept with gain 1 - p", "kept with gain 1", "random tokens", "soft, one constant per block"]
    section = Section(title="Other ways to execute the same weights", columns=columns, rows=rows, notes=[note])
    return markdown([section]).strip("\n") if rows else ""


def exit_thresholds(figures: ByArm) -> str:
    """Return a Markdown table of the early-exit model's loss and FLOPs by threshold; "" without that arm.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    rows = []
    for threshold in gates.EXITS:
        path = f"exits.{gates.exit_name(threshold)}"
        loss, skipped, flops = (values(figures, "early-exit", f"{path}.{key}") for key in ("loss", "skipped", "flops"))
        shown = ((loss, ".3f"), (skipped, ".1%"), ([value / 1e6 for value in flops], ".3f"))
        rows += [[f"{threshold:g}", *(mean_and_spread(found, form) for found, form in shown)]] if loss else []
    columns = ["threshold on survival", "loss, executed", "token-layers skipped", "MFLOPs/token"]
    note = (
        "One model, executed with several thresholds. FLOPs are counted while it runs and include, once each, the "
        "first blocks, the keys and values of every token, and the routers."
    )
    section = Section(title="Early exit by threshold", columns=columns, rows=rows, notes=[note])
    return markdown([section]).strip("\n") if rows else ""


BESIDE = (
    PublishedColumn(title="loss, soft", key="evaluation.ways.oracle.loss", published="loss", format=".4f"),
    PublishedColumn(title="alpha", key="alpha", published="alpha"),
    PublishedColumn(title="saved by the paper's metric", key="claimed", published="saved", format=".1%"),
    PublishedColumn(title="skipped", key="skipped", format=".1%"),
)
COLUMNS = (
    Column(key="evaluation.ways.oracle.loss", title="loss, soft", better="low"),
    Column(key="evaluation.ways.executed.loss", title="loss, executed", better="low"),
    Column(key="gap", title="executed - soft", format="+.3f"),
    Column(key="claimed", title="saved by the paper's metric", format=".1%"),
    Column(key="skipped", title="token-layers skipped", format=".1%"),
    Column(key="evaluation.flops_per_token.counted", title="MFLOPs/token", format=".3f", unit=1e6, relative=True),
    Column.speed("forward", "forward tokens/s, 64 rows"),
)
RIVALS = tuple(Column(key=key, title=f"vs. {rival}", format="+.3f") for key, rival in equal_flops.RIVALS.items())
GATES = (
    "Token-Selective Attention as published (arXiv 2605.05222): in every block but the first, a gate 1 - p scales "
    "each token's update, and lambda weights a penalty on open gates."
)
COUNTED = (
    "The paper's metric counts soft gates as saved work; *skipped* counts the token-layers that the executed pass "
    "leaves out, and MFLOPs are counted while that pass runs."
)
ABOUT = (
    f"{GATES} *Soft* is the pass as in training, which computes everything. *Executed* skips tokens with p >= 0.5 and "
    f"gives the kept ones gain 1, as the paper's sparse mode does. {COUNTED}"
)
EQUAL = (
    "The last columns are the executed loss minus that of dense models, of random tokens and of early exit at the "
    "arm's executed FLOPs, interpolated linearly between the models that were run; above 0 is worse."
)


def on_text(*, published: Published, corpus: str = "", **options: Any) -> Study:
    """Build a study of Token-Selective Attention on text.

    published: the figures that the paper publishes, by arm (compared recipe). corpus: name of the corpus that the paper
    uses. options: further fields of `Study`, such as `name` and `arms`.
    """
    return Study(
        seeds=SEEDS,
        measure=measured,
        measure_together=forward_speeds,
        derive=equal_flops.at_equal_flops,
        claims=judged.language,
        details=partial(details, published=published, corpus=corpus),
        **options,
    )
