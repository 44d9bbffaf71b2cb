"""The preparation of an adaptation before its first step: models, data, thresholds, a check of the first outputs."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from skipstone.adapt import flop_budget as budgets
from skipstone.adapt import influence, stages, student
from skipstone.adapt.adapt_recipe import AdaptRecipe
from skipstone.adapt.source import checked, load_dense, load_teacher, same_tokens, tokenizer_of
from skipstone.adapt.start import measure_neurons, start_measured
from skipstone.core.strict import PlainDict, refuse
from skipstone.data.corpora import find_entry
from skipstone.data.prepare import PreparedData, prepare
from skipstone.data.rows import Row
from skipstone.mechanisms import DEPTH
from skipstone.mechanisms.decisions.boundary import with_boundary_ids
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.pretrained import load_tokenizer
from skipstone.runs import Run
from skipstone.train import early, setup

NEUTRAL_ROWS = 4


@dataclass(kw_only=True)
class AdaptPlan:
    """A prepared adaptation: models, data and what the run folder records about them.

    recipe: the recipe, whose stages have no field that is None. teacher: the frozen model to distil from; None if no
    loss term needs one. model: the student, routed, with the weights of the source (the dense checkpoint that is
    adapted). data: rows for training and validation. rows: the calibration rows, each as a batch of one row. dense: the
    source's forward FLOPs per token. passing: the share of tokens that gates should let pass to meet the budget; None
    if no gate has a budget. record: the content of adaptation.json: the source with its FLOPs, the mechanisms, how much
    each block changes the residual stream, what the budget led to, and how far the first logits are from the source's.
    """

    recipe: AdaptRecipe
    teacher: SkipstoneForCausalLM | None
    model: SkipstoneForCausalLM
    data: PreparedData
    rows: list[Row]
    dense: float
    passing: float | None
    record: PlainDict


def check_early(recipe: AdaptRecipe) -> None:
    """Raise ValueError for mistakes in a recipe's mechanisms, and if a package that it needs is not installed.

    recipe: the recipe of an adaptation; its loggers and adapters may need packages. No weights are read.
    """
    early.check_loggers(recipe.train)
    stages.check_packages(recipe.adapt.stages)
    refuse(student.model_mistakes({"model": recipe.model}))


def prepare_plan(source: str, recipe: AdaptRecipe, run: Run | None = None) -> AdaptPlan:
    """Prepare everything before the first step, and check that the routed model starts with the source's logits.

    source: folder or Hub name of the dense checkpoint. recipe: the adaptation's recipe. run: the run that is resumed,
    whose tokenizer is used; None means a new run. Measurements are printed to stderr. Returns what the training needs:
    recipe, models, rows and budget (`AdaptPlan`). Raises ValueError if the source, the data or the FLOP budget do not
    fit the recipe, or if the largest difference of logits, divided by the source's largest, exceeds adapt.tolerance;
    FileNotFoundError for a source or corpus that does not exist.
    """
    dense = load_dense(source)
    data = _data(recipe, source, dense, run)
    count = min(recipe.adapt.calibration_rows, recipe.train.steps * recipe.train.batch_size)
    rows = [data.collate([data.train[i]]) for i in range(count)]  # type: ignore[index]
    flops = dense.cost(tokens=recipe.data.context).forward.total
    scores = _scores(recipe, dense, rows)
    base, dropped = _dropped(recipe, dense, scores)
    scored = _scores(recipe, base, rows) if dropped else scores
    config, capacity, passing = _config(recipe, base, scored, flops, data.tokenizer)
    model = student.route(base, config, recipe.train.seed)
    measure_neurons(model, rows)
    if recipe.adapt.start == "measured":
        start_measured(model, base, rows)
    neutral = student.neutral_start(model, base, rows[:NEUTRAL_ROWS])
    chosen = {e.kind: list(e.layers) for e in config.mechanism_entries if isinstance(e.get("layers"), list)}
    if scores is not None:
        announce(influence.table(scores, {"drop_layers": dropped} if dropped else chosen))
    announce(str(neutral))
    neutral.require(recipe.adapt.tolerance)
    record = {
        "source": source,
        "neutral_start": asdict(neutral),
        "dense_flops_per_token": flops / recipe.data.context,
        "context": recipe.data.context,
        influence.SCORE: scores,
        "dropped_layers": dropped,
        "mechanisms": [entry.plain() for entry in config.mechanism_entries],
        "budget": recipe.adapt.budget,
        "neuron_groups": config.to_dict()["neuron_groups"],
        "capacity": capacity,
        "gates_let_pass": passing,
    }
    return AdaptPlan(
        recipe=recipe,
        teacher=_teacher(recipe, dense, model, data),
        model=model,
        data=data,
        rows=rows,
        dense=flops / recipe.data.context,
        passing=passing,
        record=record,
    )


def _teacher(
    recipe: AdaptRecipe, source: SkipstoneForCausalLM, model: SkipstoneForCausalLM, data: PreparedData
) -> SkipstoneForCausalLM | None:
    wanted = recipe.adapt.loss
    if not wanted.teaches:
        return None
    teacher = source if wanted.teacher is None else load_teacher(wanted.teacher, model, data.tokenizer)
    if wanted.hidden_states:
        _check_streams(model, teacher)
    return teacher


def _data(recipe: AdaptRecipe, source: str, model: SkipstoneForCausalLM, run: Run | None) -> PreparedData:
    """Return the rows of the recipe's data, tokenised by the source's tokenizer unless the recipe names another.

    model: the source's model. run: the run that is resumed, whose tokenizer is used; None means a new one. Raises
    ValueError for a corpus, a tokenizer or a number of tokens per row that does not fit the source.
    """
    corpus, named = recipe.data.corpus, recipe.data.tokenizer
    kind = find_entry(corpus)[0].kind
    if kind not in ("text", "shards"):
        what = "is synthetic" if kind == "synthetic" else "has tokens of its own"
        raise ValueError(f"data.corpus {corpus!r} {what}; a pretrained model is adapted on text, or on shards of it")
    if recipe.data.context > model.config.max_position_embeddings:
        raise ValueError(
            f"data.context ({recipe.data.context}) is longer than the source's {model.config.max_position_embeddings}"
        )
    own = None if run is None else run.load_tokenizer()
    if own is None and named is None:
        own = load_tokenizer(source) if kind == "shards" else tokenizer_of(source, model)
    data = prepare(recipe.data, tokenizer=None if kind == "shards" else own)
    if kind == "shards" and own is not None:
        same_tokens(data.tokenizer, own, f"data.corpus {corpus!r}", source)
        data = replace(data, tokenizer=own)
    checked(data.tokenizer, f"data.corpus {corpus}" if named is None else f"data.tokenizer {named}", model)
    return setup.training_rows(data, recipe.train)


def _scores(recipe: AdaptRecipe, model: SkipstoneForCausalLM, rows: Sequence[Row]) -> list[float] | None:
    wanted = [recipe.model.get("drop_layers"), *(entry.get("layers") for entry in student.mechanisms_of(recipe.model))]
    return influence.block_influence(model, rows) if any(map(influence.wants_score, wanted)) else None


def _dropped(
    recipe: AdaptRecipe, source: SkipstoneForCausalLM, scores: Sequence[float] | None
) -> tuple[SkipstoneForCausalLM, list[int]]:
    """Return the source without the blocks that the recipe drops, and their indices.

    scores: the influence of each block; None if the recipe chooses no blocks by influence.
    """
    wanted = recipe.model.get("drop_layers")
    if wanted is None:
        return source, []
    layers = _layers(wanted, scores, source.config.num_hidden_layers, "model.drop_layers")
    return student.drop_blocks(source, layers), layers


def _layers(wanted: Any, scores: Sequence[float] | None, count: int, where: str) -> list[int]:
    if influence.wants_score(wanted):
        assert scores is not None
        return influence.choose_layers(wanted, scores, where)
    return influence.parse_layers(wanted, count, where)


def _config(
    recipe: AdaptRecipe, base: SkipstoneForCausalLM, scores: Sequence[float] | None, flops: float, tokenizer: Any
) -> tuple[SkipstoneConfig, float | None, float | None]:
    """Return the student's configuration, and what meets the budget: a capacity, or the share that gates let pass.

    At most one of the two is not None. recipe: the adaptation's recipe. base: the dense source, after blocks were
    dropped. scores: the influence of each block; None if the recipe chooses no blocks by influence. flops: the source's
    FLOPs for a row. tokenizer: the source's, from which the ids at which words begin are found.
    """
    entries = with_boundary_ids(student.with_defaults(student.mechanisms_of(recipe.model)), tokenizer)
    for i, entry in enumerate(entries):
        if influence.wants_score(entry.get("layers")):
            where = f"model.mechanisms[{i}].layers"
            entry["layers"] = _layers(entry["layers"], scores, base.config.num_hidden_layers, where)
    budget = recipe.adapt.budget
    kinds = {i: DEPTH[entry["name"]].budget_by for i, entry in enumerate(entries) if entry.get("name") in DEPTH}
    mixtures = [entries[i] for i, kind in kinds.items() if kind == "capacity"]
    for entry in mixtures if budget is not None else ():
        if "capacity" in entry:
            raise ValueError(f"adapt.budget sets the capacity of {entry['name']}: name one of them, not both")
        if entry.get("decision") == "boundary":
            raise ValueError("adapt.budget sets a capacity, but decision 'boundary' keeps what the text gives; omit it")
    for entry in [entries[i] for i, kind in kinds.items() if kind == "threshold"]:
        if "capacity" in entry:
            raise ValueError(
                f"{entry['name']} starts open here and cannot keep a capacity; leave it out and set adapt.budget"
            )
    values = {**setup.plain(base.config), "mechanisms": entries}
    if "activation" in recipe.model:
        values["activation"] = recipe.model["activation"]
    if recipe.model.get("neuron_groups") is not None:
        values["neuron_groups"] = {**student.NEURON_DEFAULTS, **recipe.model["neuron_groups"]}
    config = SkipstoneConfig.from_plain(values)
    if budget is None:
        return config, None, None
    capacity, passing = budgets.solve(config, budget, flops, recipe.data.context)
    for entry in mixtures:
        entry["capacity"] = capacity
    config = SkipstoneConfig.from_plain(values)
    what = f"capacity {capacity:g}" if capacity is not None else f"gates let {passing:.1%} of tokens pass"
    announce(f"budget: {budget:.1%} of the dense FLOPs a token at {recipe.data.context} tokens; {what}")
    return config, capacity, passing


def _check_streams(model: SkipstoneForCausalLM, teacher: SkipstoneForCausalLM) -> None:
    shapes = [(m.config.num_hidden_layers, m.config.hidden_size) for m in (model, teacher)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"adapt.loss.hidden_states compares block by block, but the student has {shapes[0][0]} blocks of width "
            f"{shapes[0][1]} and the teacher {shapes[1][0]} of {shapes[1][1]}"
        )


def announce(text: str) -> None:
    """Print `text` to stderr, from the first process only."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(text, file=sys.stderr)  # noqa: T201
