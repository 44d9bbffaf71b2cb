"""The protocol of studies that compare models at equal training FLOPs: planning, tuning, training and measuring.

Every arm (compared recipe) gets the same training FLOPs, so an arm that skips takes more steps. The learning rate falls
to 0, the weights of the last tenth of the steps are averaged, and a step has at least 8,192 tokens by default. All arms
of a seed start from the same weights where they share parameters. The learning rate is tuned for each arm on runs of a
quarter of the length, by the loss on validation text, until the best rate has two worse ones on either side. Figures
come from the test split. A recipe has one more section than `skipstone train` reads, `protocol` (`ProtocolConfig`).
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from skipstone.core.atomic_write import complete, write_json
from skipstone.core.plain_text import read_object
from skipstone.core.strict import PlainDict, PlainMapping, from_dict
from skipstone.data.config import DataConfig
from skipstone.data.prepare import PreparedData, prepare
from skipstone.measure.flops import flop_check
from skipstone.measure.passes import PASSES
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.runs import Run, last_checkpoint
from skipstone.train.recipe import read_recipe
from skipstone.train.setup import model_config
from skipstone.train.training import train
from skipstone_studies.measure import executed_training, watched
from skipstone_studies.record import digest
from skipstone_studies.study import SAVE_MINUTES, Figures, RecipeDict, recipe_file
from skipstone_studies.text_loss import by_block, capacities, mean_loss, rows, spaced

LEAST_TOKENS = 8192  # of an optimizer step
VOCABULARY = 258  # of the byte tokenizer: bytes, the end of a document, padding
WARMUP = 0.1  # share of the steps
AVERAGED = 0.1
FLANK = 2  # worse rates on either side of the best: with one, dense-8 stopped in a dip of a plateau at too high a rate
LOG_LINES = 60
COUNTED_ROWS = 32  # test rows whose FLOPs are counted
USE = "use.json"  # in a run folder: the share of its cores that the process had


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """The section `protocol` of a recipe: training FLOPs, and how the learning rate is tuned.

    budget: training FLOPs. rate: the learning rate that is tried first. factor: ratio of neighbouring rates. most:
    largest number of rates that are tried. tuning: length of the runs that tune the rate, as a share of the whole
    training; 0 means that `rate` is not tuned. tuning_rows: number of validation rows that judge a rate. test_rows:
    number of rows of the test split, evenly spaced over it; None means all of them.
    """

    budget: float
    rate: float
    factor: float = 2.0
    most: int = 9
    tuning: float = 0.25
    tuning_rows: int = 256
    test_rows: int | None = None

    def __post_init__(self) -> None:
        if not (self.factor > 1 and 0 <= self.tuning <= 1 and self.most >= 1):
            raise ValueError(f"protocol needs factor above 1, tuning in [0, 1] and most of at least 1, got {self}")


def planned(model: PlainDict, data: PlainDict, train: PlainDict, protocol: PlainDict) -> RecipeDict:
    """Return the recipe of a compared model, with as many training steps as its FLOP budget allows.

    model, data, train, protocol: sections of the recipe, of which `train` needs no steps; protocol holds fields of
    `ProtocolConfig`, and optionally `least_tokens`. Raises ValueError if a step has fewer than `least_tokens` tokens
    (8,192 by default).
    """
    protocol = dict(protocol)
    least = protocol.pop("least_tokens", LEAST_TOKENS)
    tokens = train["batch_size"] * data["context"]
    if tokens < least:
        raise ValueError(f"a step must have at least {least:,} tokens, got {tokens:,}")
    cost = step_flops(json.dumps(model, sort_keys=True), data["context"], train["batch_size"])
    steps = max(1, round(protocol["budget"] / cost))
    return copy.deepcopy(
        {
            "model": model,
            "data": {"sampling": "once", **data},
            "train": {
                "min_lr_ratio": 0.0,
                "average_last": AVERAGED,
                "eval_every": 0,
                "eval_rows": 1,
                "save_every": 0,
                **train,
                **lengths(steps),
            },
            "protocol": protocol,
        }
    )


def lengths(steps: int) -> PlainDict:
    """Return the training options that follow from the number of steps: steps, warmup_steps (a tenth) and log_every."""
    return {"steps": steps, "warmup_steps": round(WARMUP * steps), "log_every": max(1, steps // LOG_LINES)}


@lru_cache(maxsize=256)
def step_flops(model: str, context: int, rows: int) -> float:
    """Return the mean training FLOPs of a step by formulas, at the configured capacities (shares of kept tokens).

    Where the share of kept tokens falls to the capacity in the course of the training, the mean includes this. model:
    the recipe's section `model`, as JSON text. context: tokens per row. rows: rows per step.
    """
    values = json.loads(model)
    for entry in values.get("mechanisms") or ():
        if warmup := entry.get("capacity_warmup"):  # the capacity falls linearly from 1
            entry["capacity"] += warmup * (1 - entry["capacity"]) / 2
    config = model_config(values, context, {"vocab_size": VOCABULARY})
    with torch.device("meta"):
        built = SkipstoneForCausalLM(config)
    return built.cost(tokens=context, batch=rows).training.total


@lru_cache(maxsize=4)
def rows_of(config: DataConfig, split: str, training: bool) -> PreparedData:
    """Return the rows of a corpus, which are prepared once and kept, for the last four combinations of arguments.

    config: the data options. split: the split that becomes `validation` in the result. training: whether to load
    training rows, too.
    """
    return prepare(config, train=training, split=split)


def data_of(values: PlainMapping, split: str = "validation", training: bool = False) -> PreparedData:
    """Return the rows of a recipe's section `data`; whatever does not depend on the seed is prepared once per process.

    values: the section. split: the split that becomes `validation` in the result. training: whether to load training
    rows, too.
    """
    config = read_recipe({"data": dict(values)}).data
    found = rows_of(replace(config, seed=0), split, training)
    rows = None if found.train is None else replace(found.train, seed=config.seed)  # type: ignore[call-arg]
    return replace(found, config=config, train=rows)


class SharedStart(TrainerCallback):
    """A trainer callback by which all recipes of a study start from the same weights where they share parameters.

    These are the weights of the recipe's model without mechanisms and with `blocks` blocks, built from `seed`. A
    resumed training is left alone.
    """

    def __init__(self, seed: int, blocks: int) -> None:
        self.seed, self.blocks = seed, blocks

    @torch.no_grad()
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        model = kwargs["model"]
        assert isinstance(model, SkipstoneForCausalLM)
        if state.global_step:
            return
        reference = reference_weights(model.config, self.seed, self.blocks)
        for name, parameter in model.named_parameters():
            if name in reference and reference[name].shape == parameter.shape:
                parameter.copy_(reference[name])


def reference_weights(config: SkipstoneConfig, seed: int, blocks: int) -> dict[str, torch.Tensor]:
    """Return the initial weights, by name, of the model `config` with `blocks` blocks and no mechanisms, for `seed`."""
    plain = SkipstoneConfig(**{**config.to_dict(), "mechanisms": None, "num_hidden_layers": blocks})
    state = torch.get_rng_state()
    set_seed(seed)
    try:
        return {name: parameter.detach() for name, parameter in SkipstoneForCausalLM(plain).named_parameters()}
    finally:
        torch.set_rng_state(state)


def tuned_run(
    recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback], blocks: int = 8
) -> None:
    """Train a recipe at its best learning rate, which is tuned first unless a run with another seed has done so.

    If another study has finished a run of the same recipe, its folder is copied instead. The rates are stored in the
    folder `rates/` beside the run folders. recipe: what `planned` returns (the sections `model`, `data`, `train` and
    `protocol`), with `seed` in `data` and `train`. folder: the run folder. resume: whether to continue an interrupted
    run. callbacks: further callbacks of the trainer. blocks: number of blocks of the model without mechanisms whose
    initial weights all arms share. Raises ValueError if the training diverges at every rate.
    """
    if not folder.is_dir() and _taken_over(recipe, folder):
        return
    config = from_dict(ProtocolConfig, recipe["protocol"])
    rate = best_rate(tuned(recipe, folder, config, blocks)) if config.tuning else config.rate
    final = _runnable(recipe, rate, recipe["train"]["steps"])
    with watched() as use:
        _train(final, folder, resume, blocks, callbacks)
    write_json(folder / USE, {"busy": use.busy, "load": use.load})


def _taken_over(recipe: RecipeDict, folder: Path) -> bool:
    """Copy another study's run of the same recipe, whatever its name, with its rates; return whether there was one."""
    scale, (_, dash, seed) = folder.parent.name, folder.name.rpartition("-seed")
    for other in sorted(folder.parents[2].glob(f"*/{scale}/*{dash}{seed}")):
        note = recipe_file(other)
        same = note.is_file() and read_object(note) == recipe
        if other != folder and same and Run(other).finished and (other / USE).is_file():
            tuned_there, rates = rates_file(other, recipe), rates_file(folder, recipe)
            if tuned_there.is_file():  # there is none where the rate was not tuned
                rates.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(tuned_there, rates)
            with complete(folder) as partial:
                shutil.copytree(other, partial, dirs_exist_ok=True)
            return True
    return False


def _train(
    recipe: RecipeDict, folder: Path, resume: bool, blocks: int, callbacks: Sequence[TrainerCallback] = ()
) -> None:
    start = SharedStart(recipe["train"]["seed"], blocks)
    train(
        recipe,
        out=folder,
        resume=resume,
        data=data_of(recipe["data"], training=True),
        save_minutes=SAVE_MINUTES,
        callbacks=[*callbacks, start],
    )


def _runnable(recipe: RecipeDict, rate: float, steps: int) -> RecipeDict:
    """Return a recipe as `skipstone train` reads it, without its protocol, at this learning rate and length."""
    parts = {name: copy.deepcopy(recipe[name]) for name in ("model", "data", "train")}
    parts["train"] |= {"learning_rate": rate, **lengths(steps)}
    return parts


def rates_file(folder: Path, recipe: RecipeDict) -> Path:
    """Return the path of the file that holds an arm's tuned learning rates, which all seeds of a recipe share.

    folder: the run folder of the arm (compared recipe). recipe: its recipe; seeds in it are ignored.
    """
    unseeded = {name: {k: v for k, v in part.items() if k != "seed"} for name, part in recipe.items()}
    arm = folder.name.rpartition("-seed")[0]
    return folder.parent / "rates" / f"{arm}-{digest(unseeded)}.json"


def tuned(recipe: RecipeDict, folder: Path, config: ProtocolConfig, blocks: int) -> dict[float, float]:
    """Tune the learning rate of a recipe; return {rate: validation loss in nats per token} of every rate tried.

    As `climb` does, rates are tried until the best has two worse ones on either side, on short runs with seed 0 or from
    the recipe's file (`rates_file`). recipe: the recipe. folder: its run folder. config: its section `protocol`.
    blocks: number of blocks of the model that gives initial weights. Where training diverged, the loss is infinite.
    """
    path = rates_file(folder, recipe)
    known = known_rates(path)
    steps = max(1, round(config.tuning * recipe["train"]["steps"]))

    def loss_at(rate: float) -> float:
        if rate not in known:
            trial = _runnable(recipe, rate, steps)
            for part in ("data", "train"):
                trial[part]["seed"] = 0
            known[rate] = _loss_of_trial(trial, path.with_suffix("") / f"{rate:g}", config.tuning_rows, blocks)
            path.parent.mkdir(parents=True, exist_ok=True)
            write_json(path, {f"{rate:g}": loss for rate, loss in known.items()})
        return known[rate]

    climb(loss_at, config.rate, config.factor, config.most)
    return known


def known_rates(path: Path) -> dict[float, float]:
    """Return {learning rate: validation loss} from the file `path`, which `tuned` wrote; {} if it does not exist."""
    if not path.is_file():
        return {}
    return {float(rate): float(loss) for rate, loss in read_object(path).items()}


def climb(loss_at: Callable[[float], float], first: float, factor: float, most: int) -> None:
    """Try learning rates, each `factor` times its neighbour, until the best has two worse ones on either side.

    loss_at: trains at a rate, keeps the loss and returns it. first: the rate to begin with. most: how many rates are
    tried at most; if that ends the search, the best may be the smallest or largest one tried.
    """
    losses = {0: loss_at(first)}
    while len(losses) < most:
        best = min(losses, key=losses.__getitem__)
        wanted = (best + side * away for away in range(1, FLANK + 1) for side in (1, -1))
        step = next((place for place in wanted if place not in losses), None)
        if step is None:
            return
        losses[step] = loss_at(float(f"{first * factor**step:.3g}"))


def _loss_of_trial(recipe: RecipeDict, folder: Path, rows: int, blocks: int) -> float:
    """Return the validation loss of a short run on `rows` rows, infinite if it diverged; its folder is removed."""
    if folder.is_dir() and not Run(folder).finished and last_checkpoint(folder) is None:
        shutil.rmtree(folder)
    try:
        _train(recipe, folder, folder.is_dir(), blocks)
    except ValueError as error:
        if "not finite" not in str(error):
            raise
        return math.inf
    loss = mean_loss(Run(folder).load_model().eval(), data_of(recipe["data"]), rows)
    shutil.rmtree(folder)
    return loss


def best_rate(losses: dict[float, float]) -> float:
    """Return the learning rate of the lowest loss. Raises ValueError if every rate diverged (infinite losses)."""
    rate = min(losses, key=losses.__getitem__)
    if not math.isfinite(losses[rate]):
        raise ValueError(f"the training diverged at every learning rate ({', '.join(f'{r:g}' for r in losses)})")
    return rate


def tuning_figures(losses: dict[float, float]) -> PlainDict:
    """Return the figures of a run that describe how its learning rate was tuned.

    losses: the validation loss by rate. Keys of the result: `losses`, the finite ones by rate; `rate`, the best one;
    `inside`, whether rates on both sides of the best one were tried.
    """
    best, finite = best_rate(losses), {rate: loss for rate, loss in losses.items() if math.isfinite(loss)}
    return {
        "losses": {f"{rate:g}": loss for rate, loss in sorted(finite.items())},
        "rate": best,
        "inside": min(losses) < best < max(losses),
    }


def untuned(rate: float) -> PlainDict:
    """Return `tuning_figures` for a `rate` that was not tuned: {"losses": {}, "rate": rate, "inside": None}."""
    return {"losses": {}, "rate": rate, "inside": None}


def measured(folder: Path) -> Figures:
    """Return the figures of a finished run: test and validation losses, tuning, FLOPs, capacities and times.

    folder: the run folder. Keys: `loss` on the test split, in nats per token (a byte); `blocks`, the same on each block
    of text; `predictions`, the number of tokens predicted for it; `test_bytes`, the length of the test split;
    `validation_loss`; `training_flops`, as `planned` and as `executed` with the capacities that were logged;
    `forward_flops`, counted per token; `forward_share`, these divided by the dense model's; `capacity`, by block of the
    model the share of tokens kept on all rows that `loss` is measured on (in records up to 2026-12-01, on the first
    block of text alone); `tuning` (`losses`, `rate`, `inside`); `training`, the content of result.json and use.json
    (use of cores); `gflops_per_core_second`, executed training GFLOPs divided by CPU seconds.
    """
    run, recipe = Run(folder), recipe_of(folder)
    protocol, model = from_dict(ProtocolConfig, recipe["protocol"]), run.load_model().eval()
    test = data_of(recipe["data"], "test")
    found = by_block(model, test, protocol.test_rows)
    steps, result, use = recipe["train"]["steps"], run.result(), read_object(folder / USE)
    executed = executed_training(model, run, steps)
    chosen = spaced(len(test.validation), COUNTED_ROWS)
    counted = flop_check(model, PASSES["executed"], rows(test, chosen))
    seconds = result["seconds"] * use["busy"]
    predictions = sum(part.predictions for part in found)
    return {
        "training": {**result, **use},
        "training_flops": {"planned": protocol.budget, "executed": executed},
        "gflops_per_core_second": executed / seconds / 1e9 if seconds else None,
        "tuning": tuning_figures(known_rates(rates_file(folder, recipe)))
        if protocol.tuning
        else untuned(protocol.rate),
        "loss": sum(part.nats for part in found) / predictions,
        "blocks": [part.loss for part in found],
        "predictions": predictions,
        "test_bytes": test.validation_bytes,
        "validation_loss": mean_loss(model, data_of(recipe["data"]), protocol.tuning_rows),
        "forward_flops": counted.counted,
        "forward_share": counted.share,
        "capacity": capacities(found),
    }


def recipe_of(folder: Path) -> RecipeDict:
    """Return the recipe, with its section `protocol`, that a `Session` has written beside a run folder."""
    recipe: RecipeDict = read_object(recipe_file(folder))
    return recipe
