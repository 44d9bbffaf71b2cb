"""A study of the rules by which Mixture-of-Depths chooses the tokens to keep (its decisions), on one text.

It compares their losses as decided in training and as decided in generation.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from skipstone.core.strict import PlainDict
from skipstone_studies import measure
from skipstone_studies.claims import ArmComparison, ByArm, Claim, as_claims, comparisons
from skipstone_studies.headroom import headroom
from skipstone_studies.study import Column, Figures, RecipeDict, Study

CAPACITY = 0.125
SIZES: dict[str, PlainDict] = {
    "laptop": {"hidden_size": 128, "num_attention_heads": 4, "context": 128, "steps": 300, "rate": 2e-3},
    "paper": {"hidden_size": 512, "num_attention_heads": 8, "context": 512, "steps": 5000, "rate": 6e-4},
}
BLOCKS = 6
ROWS: dict[str, PlainDict] = {"python-packages": {"validation_rows": 1024}}  # of a validation set of 5 MB
SEEDS = {"laptop": (0, 1, 2), "paper": (0, 1, 2)}
PLAIN = {"weight": "raw"}  # the paper's router
ROUTED: dict[str, PlainDict] = {
    "guided": {},  # the defaults
    "guided-predictor": {"decision": "predictor"},
    "guided-threshold": {"decision": "threshold"},
    "ema_threshold": {**PLAIN, "decision": "ema_threshold"},
    "predictor": {**PLAIN, "decision": "predictor"},
    "threshold": {**PLAIN, "decision": "threshold"},
    "random": {**PLAIN, "decision": "random"},
    "positional": {**PLAIN, "decision": "positional"},
}


def arms(scale: str, corpus: str = "tiny-shakespeare") -> dict[str, RecipeDict]:
    """Return the recipes by name: a dense model, one of half its depth, and eight models with Mixture-of-Depths.

    Those with Mixture-of-Depths differ in the rule that chooses the tokens to keep (`decision`) and in what the router
    learns from. Each is a dict of settings that makes one of the compared models. scale: "laptop" or "paper". corpus:
    name of the text.
    """
    mod = {"name": "mixture_of_depths", "layers": "1::2", "capacity": CAPACITY}
    return {
        "dense": _recipe(scale, corpus, BLOCKS),
        "dense-half-depth": _recipe(scale, corpus, BLOCKS // 2),
        **{name: _recipe(scale, corpus, BLOCKS, [{**mod, **options}]) for name, options in ROUTED.items()},
    }


def _recipe(scale: str, corpus: str, blocks: int, mechanisms: list[PlainDict] | None = None) -> RecipeDict:
    size = SIZES[scale]
    return {
        "model": {
            "hidden_size": size["hidden_size"],
            "num_attention_heads": size["num_attention_heads"],
            "num_hidden_layers": blocks,
            **({"mechanisms": mechanisms} if mechanisms else {}),
        },
        "data": {"corpus": corpus, "context": size["context"], **ROWS.get(corpus, {})},
        "train": {
            "steps": size["steps"],
            "batch_size": 16,
            "learning_rate": size["rate"],
            "warmup_steps": size["steps"] // 12,
            "eval_every": 0,
            "save_every": size["steps"] // 2,
        },
    }


def measured(folder: Path) -> Figures:
    """Return the figures of one run, with the gap between training and executed loss and the realised capacity.

    folder: the run folder. Keys: `training` and `evaluation`, the content of result.json and of `skipstone eval
    --json`; `gap`, the executed loss divided by the loss with the decisions of training, minus 1; and for routed
    models: `capacity`, the share of its tokens that each routed block keeps, by its number among the routed blocks,
    from 0; `overshoot`, the 99th percentile over rows of the kept share, divided by the configured capacity, minus 1,
    largest over blocks; `precision`, `recall` and `f1`, which compare the tokens kept in the executed pass with those
    of each row that have the highest scores, as means over routed blocks.
    """
    figures = measure.standard(folder)
    ways = figures["evaluation"]["ways"]
    gap = ways["executed"]["loss"] / ways["oracle"]["loss"] - 1
    blocks = [block["mixture_of_depths"] for block in ways["executed"]["layers"] if block]
    if not blocks:
        return {**figures, "gap": gap}
    kept = {str(i): block["capacity"] for i, block in enumerate(blocks)}
    judged = {name: [b[name] for b in blocks if b.get(name) is not None] for name in ("precision", "recall", "f1")}
    means = {name: statistics.mean(values) for name, values in judged.items() if values}
    overshoot = max(block["capacity_p99"] for block in blocks) / CAPACITY - 1
    return {**figures, "gap": gap, "capacity": kept, "overshoot": overshoot, **means}


COLUMNS = (
    Column(key="evaluation.ways.oracle.loss", title="loss, oracle", format=".4f", better="low"),
    Column(key="evaluation.ways.executed.loss", title="loss, executed", format=".4f", better="low"),
    Column(key="gap", title="executed / oracle - 1", format="+.2%"),
    Column(key="evaluation.flops_per_token.counted", title="MFLOPs/token", format=".2f", unit=1e6, relative=True),
    *(Column(key=f"capacity.{i}", title=f"kept, block {2 * i + 1}", format=".3f") for i in range(BLOCKS // 2)),
    Column(key="overshoot", title="kept above capacity, p99 of rows", format="+.0%"),
    *(Column(key=name, title=name, format=".2f") for name in ("precision", "recall", "f1")),
)
ABOUT = (
    "Mixture-of-Depths on every other block at capacity 0.125. The arms differ only in the decision and in what the "
    "router learns from; figures are for the whole validation set. *Oracle* is the pass as in training, *executed* "
    "the one that generates and skips. *guided* is the package's default. *random* and *positional* are controls: a "
    "learned router that does no better has learned nothing useful. Precision, recall and F1 compare the executed "
    "decision with the top tokens of the row by the same scores, averaged over routed blocks."
)


LOSS = "evaluation.ways.executed.loss"
COMPARED = tuple(ArmComparison(key=LOSS, title="executed loss in nats", against=arm) for arm in ("dense", "random"))


def claims(figures: ByArm) -> Iterator[Claim]:
    """Yield two claims for each arm with verdicts: its loss is below the dense model's, and below random tokens'.

    Losses are those of the pass that really skips (executed). The verdict is "no headroom" if the dense model's loss is
    less than .02 nats below that of a model of half its depth. figures: the figures of every run, {arm: {seed: nested
    dict}}, where an arm is one of the compared recipes.
    """
    room = headroom(figures, "dense", ["dense-half-depth"], LOSS)
    for claim in as_claims(figures, COMPARED):
        yield claim if room is None or room.there else replace(claim, verdict="no headroom")


def details(figures: ByArm) -> str:
    """Return the Markdown below the table: what depth gains, comparisons with a dense model and with random tokens.

    What depth gains is the loss of the model of half the depth minus the dense model's. figures: the figures of every
    run, {arm: {seed: nested dict}}, where an arm is one of the compared recipes.
    """
    room = headroom(figures, "dense", ["dense-half-depth"], LOSS)
    parts = (
        "" if room is None else room.sentence(),
        comparisons(figures, COMPARED, room is not None and not room.there),
    )
    return "\n\n".join(part for part in parts if part)


def on(corpus: str, name: str) -> Study:
    """Build the study that compares the rules by which Mixture-of-Depths chooses the tokens to keep, on one corpus.

    corpus: name of the corpus. name: name of the study.
    """
    return Study(
        name=name,
        purpose=f"Every decision of Mixture-of-Depths on {corpus}: oracle and executed loss, realised capacity",
        about=ABOUT,
        arms=partial(arms, corpus=corpus),
        seeds=SEEDS,
        measure=measured,
        measure_together=None,
        claims=claims,
        details=details,
        columns=COLUMNS,
    )


MOD_DECISIONS = on("tiny-shakespeare", "mod_decisions")
MOD_DECISIONS_CODE = on("python-packages", "mod_decisions_code")
