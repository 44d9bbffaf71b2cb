"""Figures of runs that read their text many times: during training, at the last and the best step, on both splits.

The paper (arXiv 2605.05222) reads Tiny-Shakespeare 46 times and reports the last step on 20 random batches of the
validation split. Both choices are repeated here, and compared with the whole validation and test splits and with the
step of the lowest validation loss.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.data.packing import CoveringWindows, RandomWindows
from skipstone.evaluate.evaluation import evaluate
from skipstone.evaluate.loaded_run import LoadedRun, load_run
from skipstone.evaluate.tables import UNKNOWN, Section, markdown
from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import PASSES
from skipstone.runs import BEST, Run
from skipstone_studies.claims import ByArm, values
from skipstone_studies.page import mean_and_spread

RECORDED = "overfitting"  # key of the figures in a record
RANDOM_BATCHES = f"{RECORDED}.random_batches.loss"
SOFT = "evaluation.ways.oracle.loss"
BATCHES, ROWS = 20, 64  # as in the paper
RISE = 0.01  # nats above the best validation loss; two runs of one setting differ by this much in the paper
SEED = 0


def measured(folder: Path) -> PlainDict:
    """Return the course of a run's losses in nats per token; {} for a run that did not keep its best step.

    folder: the run folder. Keys: `curve`, [step, loss with the decisions of training, loss with those of generation
    (None if it was not measured)] at each validation; `random_batches`, the last step's loss on windows at random
    places, as arXiv 2605.05222 measures it; `test`, the last step's losses on the test split; `best`, the `step` of the
    lowest validation loss, and its losses on the splits `validation` and `test`. Losses on a split are `soft`, with the
    decisions of training, `executed`, in the pass that really skips, and the counted `flops` per token of that pass.
    """
    run = Run(folder)
    best = run.best()
    if best is None:
        return {}
    lines = [line for line in run.metrics() if line["split"] == "validation"]
    data = run.data_config()
    splits = {
        split: _losses(folder / BEST, split, corpus=data.corpus, context=data.context)
        for split in ("validation", "test")
    }
    return {
        "curve": [[line["step"], line["oracle_loss"], line.get("causal_loss")] for line in lines],
        "random_batches": random_batches(load_run(folder)),
        "test": _losses(folder, "test"),
        "best": {"step": best["step"], **splits},
    }


def _losses(folder: Path, split: str, corpus: str | None = None, context: int | None = None) -> PlainDict:
    """Return losses of a run on a whole split.

    Keys: `soft`, the loss in nats per token with the decisions of training; `executed` and `flops`, the loss of the
    pass that really skips and its counted FLOPs per token.
    """
    found = evaluate(folder, split=split, batch_size=ROWS, corpus=corpus, context=context)
    losses = {name: result.loss for name, result in found.measured.items()}
    executed = losses[found.primary]
    return {"soft": losses.get("oracle", executed), "executed": executed, "flops": found.flops.counted}


def random_batches(loaded: LoadedRun) -> PlainDict:
    """Return the loss over 20 batches of 64 windows at random places of the validation split, as arXiv 2605.05222 does.

    loaded: the run. The windows are the same for all runs of a text. The result is {"loss": with the decisions of
    training, mean over batches, "deviation": standard deviation of the batches' losses}, in nats per token.
    """
    found = [measure_loss(loaded.model, PASSES["oracle"], [batch], activations=False).loss for batch in _drawn(loaded)]
    return {"loss": statistics.fmean(found), "deviation": statistics.stdev(found)}


def _drawn(loaded: LoadedRun) -> Iterator[dict[str, Tensor]]:
    data = loaded.data
    assert data is not None
    assert isinstance(data.validation, CoveringWindows)
    windows = RandomWindows(ids=data.validation.ids, context=data.validation.context, seed=SEED, rows=BATCHES * ROWS)
    for batch in range(BATCHES):
        rows = windows.__getitems__(range(batch * ROWS, (batch + 1) * ROWS))
        yield {name: x.to(loaded.model.device) for name, x in data.collate(rows).items()}


def table(figures: ByArm) -> str:
    """Return a Markdown table of each arm's losses at its last and best step; "" if no run kept its best step.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    rows = []
    for arm in figures:
        steps = values(figures, arm, f"{RECORDED}.best.step")
        if not steps:
            continue
        keys = (
            "evaluation.ways.executed.loss" if values(figures, arm, "evaluation.ways.executed.loss") else SOFT,
            f"{RECORDED}.best.validation.executed",
            f"{RECORDED}.test.executed",
            f"{RECORDED}.best.test.executed",
        )
        cells = [mean_and_spread(values(figures, arm, key), ".4f") for key in keys]
        rows.append([arm, mean_and_spread(steps, ",.0f"), *cells, _risen(figures, arm)])
    columns = ["arm", "best step", "validation, last", "best", "test, last", "best", "overfits from"]
    note = (
        "Losses in nats of the pass that skips. *Best* is the validated step with the lowest validation loss; the test "
        "split played no part in choosing it. *Overfits from* is the first step after which the validation loss stays "
        f"more than {RISE:g} nats above the best."
    )
    section = Section(title="Last and best step", columns=columns, rows=rows, notes=[note])
    return markdown([section]).strip("\n") if rows else ""


def _risen(figures: ByArm, arm: str) -> str:
    """Return, for each seed, the step from which on the validation loss stays more than .01 nats above its minimum.

    figures: the figures of every run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes. The
    steps are separated by commas; a dash means that there is none.
    """
    found = []
    for seed in figures[arm].values():
        curve = [(step, oracle if causal is None else causal) for step, oracle, causal in seed[RECORDED]["curve"]]
        best = min(loss for _, loss in curve)
        last_good = max(step for step, loss in curve if loss <= best + RISE)
        found.append(next((f"{step:,}" for step, _ in curve if step > last_good), UNKNOWN))
    return ", ".join(found)
