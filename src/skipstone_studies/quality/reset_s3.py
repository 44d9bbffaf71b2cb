"""A study of whether a learned router finds the tokens that need depth, on Reset-S3, a task where they are known.

The first two blocks of the routed models are dense, because tokens differ only after some mixing. Tokens of the task
are operations and fillers; the more operations since the last reset, the more difficult a token is.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.data.synthetic import BINS
from skipstone.measure.losses import MEASURED, OVERALL, headroom_captured
from skipstone.model.released import tsa
from skipstone_studies import measure
from skipstone_studies.claims import ArmComparison, as_claims, comparisons
from skipstone_studies.quality.tsa.recipes import ALONE, HARD, LEARNED
from skipstone_studies.study import Column, Figures, RecipeDict, Study

CAPACITY = 0.25  # share of entries that are operations
BLOCKS = 8  # blocks of the routed models and of the deepest dense one
ROUTED = "2:"
DENSE = {"laptop": (2, 4), "paper": (2, 4, 8)}
DECISIONS: dict[str, PlainDict] = {  # options of Mixture-of-Depths; all execute causally
    "mod-guided": {},
    "mod-guided-predictor": {"decision": "predictor"},
    "mod-guided-threshold": {"decision": "threshold"},
    "mod-unguided": {"decision": "ema_threshold", "weight": "raw"},
    "mod-paper": {"decision": "predictor", "weight": "raw"},
    "mod-random": {"decision": "random"},
    "mod-positional": {"decision": "positional"},
}
GATES: dict[str, PlainDict] = {  # options of Token-Selective Attention
    "tsa-hard": {**HARD, **LEARNED, "capacity": CAPACITY},
    "tsa-hard-kept": {**HARD, **LEARNED, **ALONE, "capacity": CAPACITY},
    "tsa-soft": {"depth_weight": tsa.SYNTHETIC},
}
JUDGED = (*DECISIONS, *GATES)  # the arms whose headroom is measured
SIZES: dict[str, PlainDict] = {
    "laptop": {"hidden_size": 64, "num_attention_heads": 4, "steps": 2000, "batch_size": 32, "rate": 2e-3},
    "paper": {"hidden_size": 256, "num_attention_heads": 8, "steps": 20000, "batch_size": 256, "rate": 1e-3},
}
SEEDS = {"laptop": (3, 4, 5), "paper": (3, 4, 5, 6, 7)}  # without seed 0, on which the guided router was chosen


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the recipes by name: dense models of several depths, and models that skip tokens, by various routers.

    Each is a dict of settings that makes one of the compared models. scale: "laptop" or "paper".
    """
    size = SIZES[scale]
    return {
        **{f"dense-{blocks}": recipe(size, blocks) for blocks in DENSE[scale]},
        **{name: recipe(size, BLOCKS, [mixture(**options)]) for name, options in DECISIONS.items()},
        **{name: recipe(size, BLOCKS, [gate(**options)]) for name, options in GATES.items()},
        "mod-forced": recipe(size, BLOCKS, [mixture(decision="forced")], routing="difficulty"),
    }


def mixture(**options: Any) -> PlainDict:
    """Return a `mechanisms` entry of Mixture-of-Depths on all blocks but the first two.

    Its capacity is the share of tokens that are operations in Reset-S3. options: further options of the entry, such as
    `decision`.
    """
    return {"name": "mixture_of_depths", "layers": ROUTED, "capacity": CAPACITY, **options}


def gate(**options: Any) -> PlainDict:
    """Return a `mechanisms` entry of Token-Selective Attention on all blocks but the first two.

    Its gates scale updates in training and skip tokens in generation, unless `options` say otherwise. options: further
    options of the entry, such as `decision`.
    """
    return tsa.gate(**{"layers": ROUTED, "execution": "hard", **options})


def recipe(
    size: PlainMapping,
    blocks: int,
    mechanisms: list[PlainDict] | None = None,
    corpus: str = "reset-s3",
    **train: Any,
) -> RecipeDict:
    """Return the recipe (dict of settings) of one model that is trained on a synthetic task.

    size: hidden_size, num_attention_heads, steps, batch_size and rate (the learning rate). blocks: number of blocks.
    mechanisms: entries of the model's `mechanisms`; None means dense. corpus: name of the task. train: options of the
    recipe's section `train` that replace the usual ones, by name.
    """
    steps = size["steps"]
    return {
        "model": {
            "hidden_size": size["hidden_size"],
            "num_attention_heads": size["num_attention_heads"],
            "num_hidden_layers": blocks,
            **({"mechanisms": mechanisms} if mechanisms else {}),
        },
        "data": {"corpus": corpus},
        "train": {
            "steps": steps,
            "batch_size": size["batch_size"],
            "learning_rate": size["rate"],
            "warmup_steps": steps // 20,
            "eval_every": steps // 8,
            "eval_rows": 256,
            "save_every": steps // 4,
            **train,
        },
    }


def measured(folder: Path) -> Figures:
    """Return the figures of one run: training, evaluation, and accuracy and FLOPs of the executed pass.

    folder: the run folder. Keys: `training` and `evaluation`, the content of result.json and of `skipstone eval
    --json`; `accuracy`, the share of correct operations by bin of difficulty (operations since the last reset);
    `flops`, counted per token. The pass is the model's main one, which skips as generation does.
    """
    figures = measure.standard(folder)
    evaluation = figures["evaluation"]
    accuracy = evaluation["ways"][evaluation["main"]]["accuracy"]
    return {**figures, "accuracy": accuracy, "flops": evaluation["flops_per_token"]["counted"]}


def captured(
    figures: Mapping[str, Figures], judged: Sequence[str] = JUDGED, knowing: str = "mod-forced"
) -> dict[str, Figures]:
    """Return where each judged arm's accuracy lies between a dense model (0) and one that keeps the operations (1).

    The result is {arm: {"headroom": {bin of difficulty: value}}}, where difficulty is the number of operations since
    the last reset. Dense accuracies are interpolated at the arm's executed FLOPs. figures: what `measured` returned for
    each arm (compared recipe) with one seed, by arm. judged: names of the arms to judge. knowing: name of the arm that
    keeps exactly the operations, which need depth. The result is {} if that arm or the dense arms are missing.
    """
    dense = [found for arm, found in figures.items() if arm.startswith("dense-")]
    forced = figures.get(knowing)
    if not dense or forced is None:
        return {}
    used = [*dense, forced, *(figures[arm] for arm in judged if arm in figures)]
    bins = [name for name in MEASURED if all(found["accuracy"][name] is not None for found in used)]
    return {arm: {"headroom": _headroom(figures[arm], dense, forced, bins)} for arm in judged if arm in figures}


def _headroom(arm: Figures, dense: list[Figures], forced: Figures, bins: list[str]) -> dict[str, float]:
    found = {}
    for name in bins:
        points = sorted((model["flops"], model["accuracy"][name]) for model in dense)
        equal = interpolate(arm["flops"], points)
        found[name] = headroom_captured(arm["accuracy"][name], equal, forced["accuracy"][name])
    return found


def interpolate(x: float, points: list[tuple[float, float]]) -> float:
    """Return y at `x` by linear interpolation between `points` (x, y), sorted by x; constant outside of them."""
    if x <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if x <= x1:
            return y0 + (y1 - y0) * (x - x0) / (x1 - x0)
    return points[-1][1]


ABOUT = (
    "Each entry of a row is either a filler or an operation on a hidden state: a reset, or an element of S3. The "
    "label of an operation is the resulting state, so an operation needs more depth the more operations have passed "
    "since the reset (the bins). All figures are those of the pass that skips. In arms with mechanisms, the first two "
    "of 8 blocks are dense.\n\n* *mod-guided* is the package's default Mixture-of-Depths: a running threshold, and a "
    "router that learns from the gradient at its block's output. *mod-guided-predictor* and *mod-guided-threshold* "
    "train top-k with that router and decide by a predictor or a fixed threshold.\n* *mod-unguided* has a running "
    "threshold and raw weights; *mod-paper* is top-k with raw weights and a predictor.\n* *mod-forced* keeps exactly "
    "the operations, *mod-random* random tokens, and *mod-positional* every fourth token.\n* *tsa-hard* is "
    "Token-Selective Attention trained as it is executed, with gates that learn as in *mod-guided*; skipped tokens "
    "provide keys and values in *tsa-hard* and not in *tsa-hard-kept*. *tsa-soft* is the published variant with "
    "lambda 0.01, executed hard.\n\n*Headroom captured* is (arm - dense) / (forced - dense) in accuracy, where the "
    "dense accuracy is interpolated between the dense arms at the arm's executed FLOPs (an arm that executes more "
    "FLOPs than the deepest dense arm is compared with that one, which flatters it): 0 is no better than dense, and 1 "
    "as good as forced decisions, which are not an upper bound. At laptop scale there is no dense arm with all 8 "
    "blocks, so the loss of skipping relative to it is unknown."
)
COMPARED = ArmComparison(
    key=f"accuracy.{OVERALL}", title="accuracy, all", against="mod-random", arms=JUDGED, format="+.1%", better="high"
)
RESET_S3 = Study(
    name="reset_s3",
    purpose="Does a learned router find the tokens that are known to need depth?",
    about=ABOUT,
    arms=arms,
    seeds=SEEDS,
    measure=measured,
    measure_together=None,
    derive=captured,
    claims=partial(as_claims, compared=[COMPARED]),
    details=partial(comparisons, compared=[COMPARED]),
    columns=(
        Column(key="flops", title="MFLOPs/token", format=".3f", unit=1e6),
        *(Column(key=f"accuracy.{name}", title=f"accuracy {name}", format=".1%", better="high") for name in BINS),
        Column(key=f"accuracy.{OVERALL}", title="accuracy, all", format=".1%", better="high"),
        Column(key="headroom.4-7", title="headroom captured, 4-7", format=".2f"),
        Column(key=f"headroom.{OVERALL}", title="headroom captured, all", format=".2f"),
    ),
)
