"""PolyGLU adapted from a SwiGLU checkpoint, compared with PolyGLU trained from scratch at equal FLOPs.

A small SwiGLU model is trained first. It is then trained further, unchanged or adapted to PolyGLU, for the FLOPs of
`MORE` steps of PolyGLU. From scratch, PolyGLU and SwiGLU are trained for the FLOPs of both parts together, and PolyGLU
for those of the second part alone, as if the checkpoint were free.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from skipstone.core.strict import PlainDict
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.measure.losses import measure_loss
from skipstone.mechanisms.mix_figures import MixFigures
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.runs import Run
from skipstone_studies.adapting import adapt_run
from skipstone_studies.claims import ArmComparison, as_claims, comparisons
from skipstone_studies.study import Column, Figures, RecipeDict, Study

STEPS, MORE = 400, 200
CONTEXT, BATCH, TINY = 128, 16, {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
CHARACTERS = 65  # vocabulary of Tiny-Shakespeare
RATE, LATER = 3e-3, 1e-3  # from scratch, and from a checkpoint
NEUTRAL = {"name": "polyglu", "noise": False, "tau_end": 1.0}  # for a start at the identity
SOURCE, ADAPTED, TUNED = "SwiGLU, the checkpoint", "checkpoint, adapted to PolyGLU", "checkpoint, trained on"


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: a SwiGLU checkpoint, two ways to train it further, and models trained from scratch.

    Each is a dict of settings that makes one of the compared models. The checkpoint is trained further as it is, or
    adapted to PolyGLU. From scratch, one SwiGLU and one PolyGLU get as many training FLOPs as the checkpoint and its
    further training together, and another PolyGLU as many as the further training alone. scale: not used.
    """
    ratio = forward_flops("polyglu") / forward_flops("silu")
    whole = STEPS + MORE * ratio  # in steps of SwiGLU
    return {
        SOURCE: _scratch("silu", STEPS),
        ADAPTED: _onwards({"activation": NEUTRAL}, MORE),
        TUNED: _onwards({}, round(MORE * ratio)),
        "PolyGLU from scratch": _scratch("polyglu", round(whole / ratio)),
        "SwiGLU from scratch": _scratch("silu", round(whole)),
        "PolyGLU from scratch, FLOPs of adapting alone": _scratch("polyglu", MORE),
    }


@cache
def forward_flops(activation: str) -> float:
    """Return the forward FLOPs of a row of the study's model with this activation, "silu" or "polyglu"."""
    with torch.device("meta"):
        config = SkipstoneConfig.from_plain({**TINY, "activation": activation, "vocab_size": CHARACTERS})
        return float(SkipstoneForCausalLM(config).cost(tokens=CONTEXT).forward.total)


def _scratch(activation: str, steps: int) -> RecipeDict:
    return {"model": {**TINY, "activation": activation}, **_rest(steps, RATE)}


def _onwards(model: PlainDict, steps: int) -> RecipeDict:
    source = {"arm": SOURCE, "steps": STEPS}
    return {"source": source, "model": model, "adapt": {"router_learning_rate": 1e-2}, **_rest(steps, LATER)}


def _rest(steps: int, rate: float) -> RecipeDict:
    train = {"steps": steps, "batch_size": BATCH, "learning_rate": rate, "warmup_steps": steps // 10}
    quiet = {"eval_every": 0, "eval_rows": 8, "save_every": max(1, steps // 4), "log_every": max(1, steps // 10)}
    return {"data": {"corpus": "tiny-shakespeare", "context": CONTEXT}, "train": {**train, **quiet}}


def measured(folder: Path) -> Figures:
    """Return the figures of one run: validation loss, training FLOPs, and how neurons choose their activations.

    folder: the run folder. Keys: `nats`, the loss in nats per character; `own_flops`, the forward FLOPs of a row times
    the run's steps, which are proportional to its training FLOPs; for PolyGLU also `apart`, the share of neurons whose
    strongest activation is not the most common one of their layer, as a mean over layers and the tokens of the first 32
    rows.
    """
    loaded = load_run(folder, "validation")
    assert loaded.data is not None
    rows = list(batches(loaded.data, 32, loaded.model.device))
    steps = Run(folder).result()["steps"]
    found: PlainDict = {
        "nats": measure_loss(loaded.model, loaded.primary, rows, activations=False).loss,
        "own_flops": loaded.model.cost(tokens=CONTEXT).forward.total * steps,
    }
    records = loaded.model(**rows[0], routing="causal", output_records=True).records
    mixes: list[Any] = [module for module in loaded.model.routing_modules() if isinstance(module, MixFigures)]
    if mixes:
        each = [mix.diversity(records[mix.placement.layer][mix.placement.name]).nanmean() for mix in mixes]
        found["apart"] = float(torch.stack(each).mean())
    return found


def derive(figures: Mapping[str, Figures]) -> dict[str, Figures]:
    """Return for each arm `flops`, a ratio of training FLOPs, and `over`, a difference of losses.

    flops: the arm's training FLOPs divided by the checkpoint's, including the checkpoint's own training where an arm
    starts from it. over: the arm's loss minus that of the checkpoint trained further as it is, in nats per character.
    figures: what `measured` returned for each arm (compared recipe) with one seed, by arm. The result is {} if the
    checkpoint or its further training is missing.
    """
    source, tuned = figures.get(SOURCE), figures.get(TUNED)
    if source is None or tuned is None:
        return {}
    return {
        arm: {
            "flops": found["own_flops"] / source["own_flops"] + (arm in (ADAPTED, TUNED)),
            "over": found["nats"] - tuned["nats"],
        }
        for arm, found in figures.items()
    }


COMPARED = (
    ArmComparison(key="nats", title="nats", against=TUNED, arms=[ADAPTED]),
    ArmComparison(key="nats", title="nats", against="SwiGLU from scratch", arms=["PolyGLU from scratch"]),
)
ADAPT_POLYGLU = Study(
    name="adapt_polyglu",
    purpose="PolyGLU adapted from a SwiGLU checkpoint, and from scratch",
    about=(
        "Tiny-Shakespeare, 4 blocks of width 64, rows of 128 characters. *FLOPs* are training FLOPs, forward and "
        "backward, relative to those of the SwiGLU checkpoint. *Nats* are measured on the whole validation split. "
        "*Apart* is the share of neurons whose strongest activation is not the most frequent one of their layer, "
        "averaged over layers and tokens."
    ),
    arms=arms,
    seeds={"laptop": (0, 1, 2)},
    make=adapt_run,
    measure=measured,
    measure_together=None,
    derive=derive,
    claims=partial(as_claims, compared=COMPARED),
    details=partial(comparisons, compared=COMPARED),
    columns=(
        Column(key="flops", title="training FLOPs", format=".2f"),
        Column(key="nats", title="nats", format=".4f"),
        Column(key="over", title="nats above the checkpoint trained on", format="+.4f"),
        Column(key="apart", title="apart", format=".1%"),
    ),
)
