"""`adapt`: change a dense checkpoint into a model that computes less, by a recipe, and write a run folder."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, set_seed

from skipstone.adapt import flop_budget as budgets
from skipstone.adapt import stages
from skipstone.adapt.adapt_recipe import AdaptRecipe, read_recipe
from skipstone.adapt.adapt_trainer import AdaptTrainer, on_device
from skipstone.adapt.plan import AdaptPlan, announce, check_early, prepare_plan
from skipstone.core import checksums
from skipstone.core.atomic_write import write_json
from skipstone.core.sealed import sealed
from skipstone.core.strict import PlainMapping
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.pretrained import files_of
from skipstone.runs import TOKENIZER, Run
from skipstone.train import folder as folders
from skipstone.train import parallel, setup
from skipstone.train.recipe import to_dict
from skipstone.train.trainer import RunTrainer
from skipstone.train.training import finish, fit, held, open_run

RECORD = "adaptation.json"  # in the run folder: what was measured before the training began
COUNTED_ROWS = 16
THRESHOLD_ROWS = 32  # of the calibration rows: a threshold is one number, and every try is a pass over all of them


def adapt(
    source: str,
    config: PlainMapping,
    *,
    out: Path | None = None,
    resume: bool = False,
    progress: bool = True,
    save_minutes: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Adapt a dense checkpoint into a model that computes less, by a recipe, and return the run folder.

    source: a folder or the Hub name of the dense checkpoint. config: the recipe as a plain dict with the keys name,
    model, data, train and adapt. out: the run folder; None means runs/NAME, or runs/CORPUS-TIME for a recipe without a
    name. resume: continue an existing run from its last checkpoint; a finished run is left unchanged. progress: show a
    progress bar. save_minutes: largest interval between checkpoints, unless the recipe sets one; None means that steps
    alone decide. callbacks: further callbacks for Trainer. Raises ValueError for mistakes in the recipe and a source
    that does not fit, FileNotFoundError for a source or a run to resume that does not exist, and FileExistsError if the
    folder of a new run is not empty, all before anything is written; `Interrupted` after a stop signal.
    """
    recipe = read_recipe(config)
    check_early(recipe)
    with held(recipe, out, resume) as folder:
        if resume and Run(folder).finished:
            _check_sections(Run(folder), source, recipe)
        run = open_run(recipe, folder, resume)
        if run is not None and run.finished:
            return folder
        plan = _begin(source, recipe, folder, run)
        return _train(plan, folder, progress, save_minutes, callbacks)


def _check_sections(run: Run, source: str, recipe: AdaptRecipe) -> None:
    """Raise ValueError if source, `data`, `train` or `adapt` differ from those of the finished run to be resumed."""
    saved, given = run.config(), {**to_dict(recipe), "source": source}
    names = ("source", "data", "train", "adapt")
    folders.check_same({name: saved.get(name) for name in names}, {name: given[name] for name in names})


def _begin(source: str, recipe: AdaptRecipe, folder: Path, run: Run | None) -> AdaptPlan:
    """Prepare an adaptation up to its first step, and write the folder of a new run; return the plan.

    source, recipe: as in `prepare_plan`. folder: the run folder. run: the run that is resumed; None means a new one.
    """
    plan = prepare_plan(source, recipe, run)
    resolved = to_dict(recipe) | {"model": setup.plain(plan.model.config), "source": source}
    arguments = setup.arguments(recipe.train, folder)
    setup.check_batch(plan.model.config, recipe.train, recipe.data.context)
    together = int(os.environ.get("WORLD_SIZE", "1")) > 1 or recipe.train.parallel == "fsdp2"
    stages.check(plan.model, recipe.adapt.stages, together)
    if recipe.train.parallel == "fsdp2" and stages.needs_adapters(recipe.adapt.stages):
        raise ValueError("stages with LoRA adapters need train.parallel=ddp: a sharded model cannot merge them")
    fingerprint = _fingerprint(source, plan)
    if run is not None:
        folders.check_same(run.config(), resolved)
        folders.check_data(folder, fingerprint, "the data, or the weights of source or teacher,")
    if arguments.process_index == 0:
        parts: dict[str, folders.Write] = {
            RECORD: lambda path: write_json(path, sealed(plan.record)),
            TOKENIZER: partial(folders.save_tokenizer, plan.data.tokenizer),
        }
        if run is None:
            folders.create(folder, resolved, recipe.train.seed, parts, fingerprint)
        else:
            folders.add_absent(folder, parts)
    return plan


def _fingerprint(source: str, plan: AdaptPlan) -> str:
    """Return a hash of the data and of the weights of source and teacher; a resumed run must have the same.

    plan: provides the data and the teacher's name.
    """
    teacher = plan.recipe.adapt.loss.teacher if plan.teacher is not None else None
    files = [path for name in (source, teacher) if name is not None for path in files_of(name)]
    parts = [str(plan.data.fingerprint), *(f"{path.name} {checksums.file_sha256(path)}" for path in files)]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _train(
    plan: AdaptPlan, folder: Path, progress: bool, save_minutes: float | None, more: Sequence[TrainerCallback]
) -> Path:
    recipe = plan.recipe
    arguments = setup.arguments(recipe.train, folder)
    if plan.teacher is not None:
        plan.teacher.to(arguments.device)
    set_seed(recipe.train.seed)
    needed = stages.needs_adapters(recipe.adapt.stages)
    tuner = stages.add_adapters(plan.model, recipe.adapt.lora) if needed else None
    if recipe.train.compile:
        for block in plan.model.model.layers:
            block.compile()
    stages.unfreeze(plan.model, recipe.adapt.stages[0])  # before sharding, which fixes the choice
    parallel.prepare(plan.model, recipe.train, arguments.device)

    def trainer_of(callbacks: list[TrainerCallback]) -> RunTrainer:
        return AdaptTrainer(
            adapt=recipe.adapt,
            teacher=plan.teacher,
            passing=plan.passing,
            recipe=recipe.train,
            data=plan.data,
            model=plan.model,
            args=arguments,
            callbacks=[*callbacks, *more],
        )

    return fit(recipe, arguments, folder, progress, trainer_of, partial(_finish, plan, tuner, folder), save_minutes)


def _finish(plan: AdaptPlan, tuner: Any, folder: Path, trainer: RunTrainer) -> None:
    """Merge adapters, set thresholds to the budget, measure what is executed, and save model and summary.

    plan: the prepared adaptation. tuner: PEFT's, which holds the adapters; None without any. folder: the run folder.
    trainer: after its last step.
    """
    assert trainer.alone is not None  # the trainer has left the rest to this process
    model = trainer.alone.requires_grad_(True)
    if tuner is not None:
        stages.merge_adapters(model, tuner)
    rows = [on_device(row, model.device) for row in plan.rows[:THRESHOLD_ROWS]]
    asked = plan.recipe.adapt.budget
    changed = budgets.close(model) or asked is not None or tuner is not None
    if asked is not None:
        budgets.calibrate(model, rows, asked, plan.dense)
    if changed:
        trainer.evaluate()
    reached = None if trainer.obstacle else _reached(plan, model)
    more = {"neutral_start": plan.record["neutral_start"], "executed_share": reached, "budget": asked}
    if model.config.neuron_groups is not None:  # which save where one token is computed at a time
        more["decoding_share"] = round(model.cost(tokens=1, past=plan.recipe.data.context).ratio, 4)
        announce(f"in decoding: {more['decoding_share']:.1%} of the dense FLOPs a token")
    if asked is not None and reached is not None:
        within = abs(reached / asked - 1) <= budgets.WITHIN
        announce(f"executed: {reached:.1%} of the dense FLOPs a token, budget {asked:.1%}")
        more["within_budget"] = within
        if not within:
            warnings.warn(f"the budget of {asked:.1%} was missed: {reached:.1%} is executed", stacklevel=2)
    finish(plan.data, folder, trainer, **more)


def _reached(plan: AdaptPlan, model: SkipstoneForCausalLM) -> float:
    """Return the FLOPs per token that are executed on validation rows, as a share of the dense source's.

    Rows run one at a time. They have data.context tokens, as those for which the source's FLOPs are counted, unless all
    rows are shorter. plan: provides rows and the source's FLOPs. model: the adapted model.
    """
    data, context = plan.data, plan.recipe.data.context
    count = min(COUNTED_ROWS, len(data.validation))
    rows = [on_device(data.collate([data.validation[i]]), model.device) for i in range(count)]
    whole = [row for row in rows if row["input_ids"].shape[1] == context] or rows
    return round(budgets.counted(model.eval(), whole) / plan.dense, 4)  # type: ignore[arg-type]
