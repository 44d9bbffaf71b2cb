"""Build the model's configuration, the model, and Trainer's arguments from a recipe."""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping
from pathlib import Path

import psutil
import torch
from transformers import TrainerCallback, TrainingArguments, set_seed

from skipstone import presets
from skipstone.core.strict import PlainDict, PlainMapping, mistakes
from skipstone.data.prepare import PreparedData
from skipstone.mechanisms.decisions.boundary import with_boundary_ids
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.fields import FOREIGN, TYPES
from skipstone.runs import CHECKPOINTS
from skipstone.train import early
from skipstone.train.recipe import Recipe, TrainConfig

TOKENIZER = "tokenizer"  # the key of `data_defaults` that is no model option


def model_config(values: PlainMapping, context: int, defaults: PlainMapping) -> SkipstoneConfig:
    """Return the model configuration of a recipe; options that the recipe does not set follow from its data.

    values: the recipe's section `model`, which takes precedence. context: tokens of a row (`data.context`), the maximum
    number of positions if the recipe sets none. defaults: options that follow from the data, such as `vocab_size` and
    `tokenizer`; empty to check the other options before data are read. Raises ValueError for invalid keys and values,
    for a maximum number of positions below `context`, and for a vocabulary that is too small for the tokenizer.
    """
    given = {"max_position_embeddings": context, **defaults, **values}
    preset, tokenizer = given.pop("preset", None), given.pop(TOKENIZER, None)
    if tokenizer is not None and isinstance(given.get("mechanisms"), list):
        given["mechanisms"] = with_boundary_ids(given["mechanisms"], tokenizer)
    needed, own = defaults.get("vocab_size", 0), values.get("vocab_size")
    if isinstance(own, int) and own < needed:  # a clearer error than one about special tokens outside of it
        raise ValueError(f"model.vocab_size ({own}) is too small: the tokenizer has {needed} tokens")
    config = SkipstoneConfig.from_plain(given) if preset is None else presets.get(preset, **given)
    if config.weight_format != "float":
        raise ValueError("model.weight_format must be float in training; `skipstone quantise` rounds a trained model")
    if config.max_position_embeddings < context:
        raise ValueError(
            f"model.max_position_embeddings ({config.max_position_embeddings}) is shorter than data.context ({context})"
        )
    return config


def data_defaults(data: PreparedData) -> PlainDict:
    """Return the model options that follow from prepared data: vocabulary size and special tokens.

    Keys: `vocab_size`; if the data have a tokenizer also `eos_token_id`, `bos_token_id`, `pad_token_id` (each may be
    None; a pad token that is also eos or bos gives None) and `tokenizer`, the tokenizer itself, which is no option of a
    model: `model_config` uses and removes it.
    """
    found: PlainDict = {"vocab_size": data.vocab_size}
    if data.tokenizer is not None:
        found[TOKENIZER] = data.tokenizer
        eos, pad = data.tokenizer.eos_token_id, data.tokenizer.pad_token_id
        found |= {"eos_token_id": eos, "bos_token_id": data.tokenizer.bos_token_id}
        # The embedding of a pad token is never trained, so a token with another use must not be the pad token.
        found["pad_token_id"] = pad if pad not in (eos, data.tokenizer.bos_token_id) else None
    return found


def plain(config: SkipstoneConfig) -> PlainDict:
    """Return the whole model configuration `config` as plain values by field, without fields that are None."""
    values = config.to_dict()
    names = [field.name for field in dataclasses.fields(config) if field.name in TYPES]
    return {name: values[name] for name in names if values.get(name) is not None}


def build_model(config: SkipstoneConfig, train: TrainConfig) -> SkipstoneForCausalLM:
    """Build a model with fresh weights that depend on the seed only; compile its blocks if the recipe says so.

    config: the model's configuration. train: the training options, for `seed` and `compile`. Raises ValueError for
    weights that would not fit into the machine's memory.
    """
    size, memory = 4 * config.weights(), psutil.virtual_memory().total
    if size > memory:
        raise ValueError(
            f"the model's weights take {size / 2**30:,.0f} GiB in fp32 (hidden_size {config.hidden_size:,}, "
            f"{config.num_hidden_layers:,} layers), this machine has {memory / 2**30:,.0f} GiB of memory"
        )
    set_seed(train.seed)
    model = SkipstoneForCausalLM(config)
    if train.compile:
        for block in model.decoder.layers:
            block.compile()
    return model


def check_batch(config: SkipstoneConfig, train: TrainConfig, context: int) -> None:
    """Raise ValueError if the hidden states of a micro-batch, or of a validation batch, exceed the machine's memory.

    Hidden states are the least that a pass holds at once: one vector for each token, in fp32, and in training with its
    gradient. So a batch of millions of rows is refused before its rows are built. config: the model's configuration.
    train: the training options. context: tokens of a row. Nothing is checked if the training uses an accelerator.
    """
    if train.device == "auto" and torch.accelerator.is_available():
        return
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows = train.batch_size // (train.gradient_accumulation * processes)
    memory, row = psutil.virtual_memory().total, 4 * context * config.hidden_size
    for name, count, copies in (("batch_size", rows, 2), ("eval_batch_size", train.eval_batch_size or 0, 1)):
        if count * row * copies > memory:
            raise ValueError(
                f"train.{name} is too large: the hidden states of {count:,} rows of {context:,} tokens alone take "
                f"{count * row * copies / 2**30:,.0f} GiB, this machine has {memory / 2**30:,.0f} GiB of memory"
            )


def training_rows(data: PreparedData, train: TrainConfig) -> PreparedData:
    """Return the data with exactly as many training rows as the training reads, so that the training is one epoch.

    train: the training options, for `steps` and `batch_size`.
    """
    rows = train.steps * train.batch_size
    return dataclasses.replace(data, train=dataclasses.replace(data.train, rows=rows))  # type: ignore[type-var]


def arguments(train: TrainConfig, folder: Path) -> TrainingArguments:
    """Return the arguments of transformers' Trainer for a recipe.

    train: the recipe's training options. folder: the run folder; checkpoints are written to its folder `checkpoints`.
    Raises ValueError if the rows of a step cannot be divided evenly over micro-batches and processes.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    rows, rest = divmod(train.batch_size, train.gradient_accumulation * processes)
    if rest:
        raise ValueError(
            f"train.batch_size ({train.batch_size}) must be a multiple of gradient_accumulation "
            f"({train.gradient_accumulation}) times the number of processes ({processes})"
        )
    accelerated = train.device == "auto" and torch.accelerator.is_available()
    found = TrainingArguments(
        output_dir=str(folder / CHECKPOINTS),
        run_name=folder.resolve().name,
        max_steps=train.steps,
        per_device_train_batch_size=rows,
        gradient_accumulation_steps=train.gradient_accumulation,
        learning_rate=train.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": train.min_lr_ratio},
        warmup_steps=train.warmup_steps,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        max_grad_norm=train.max_grad_norm,
        bf16=train.precision == "bf16",
        use_cpu=not accelerated,
        seed=train.seed,
        eval_strategy="steps",
        eval_steps=train.eval_every or train.steps,
        save_steps=train.save_every or train.steps,
        logging_steps=train.log_every,
        logging_first_step=True,
        logging_nan_inf_filter=False,  # it would hide divergence
        report_to="none",
        project="skipstone",  # of trackio; the run has the name of its folder
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=accelerated,
        ddp_find_unused_parameters=False,  # every process uses every block (parallel.py)
        **_checkpointing(train.activation_checkpointing),
    )
    found._n_gpu = min(found.n_gpu, 1)  # several GPUs in one process would be nn.DataParallel, which loses records
    return found


def _checkpointing(wanted: bool) -> PlainDict:
    """Return the keyword argument of Trainer for activation checkpointing, which transformers 5.23 has renamed.

    wanted: whether it is switched on.
    """
    names = {field.name for field in dataclasses.fields(TrainingArguments)}
    name = "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}} if wanted else {}


def integrations(train: TrainConfig, folder: Path, step: int) -> list[TrainerCallback]:
    """Return Trainer's callbacks for the recipe's loggers other than metrics.jsonl.

    train: the training options, for `loggers`. folder: the run folder, where TensorBoard's files are written. step: the
    step from which a run is resumed, 0 for a new one; TensorBoard's entries after it are removed.
    """
    from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

    found: list[TrainerCallback] = []
    if "tensorboard" in train.loggers:
        from torch.utils.tensorboard import SummaryWriter

        found.append(TensorBoardCallback(SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)))
    if "trackio" in train.loggers:
        found.append(TrackioCallback())
    if "wandb" in train.loggers:
        found.append(WandbCallback())
    return found


def check_early(recipe: Recipe) -> None:
    """Raise ValueError for mistakes in a recipe's model or loggers, or a huge batch, before any data are read.

    A warning says that `data.train_rows` has no effect, if it is set.
    """
    early.check_loggers(recipe.train)
    check_batch(model_config(recipe.model, recipe.data.context, {}), recipe.train, recipe.data.context)
    if recipe.data.train_rows is not None:
        warnings.warn("data.train_rows has no effect on training, which reads steps * batch_size rows", stacklevel=3)


def model_mistakes(config: PlainMapping) -> list[str]:
    """Return one message per mistake in the model of a recipe, including the options of its mechanisms.

    config: the whole recipe as a plain dict; its other sections may be wrong. Without a section `model`, the list is
    empty.
    """
    model, data = config.get("model"), config.get("data")
    if not isinstance(model, Mapping):
        return []
    context = data.get("context") if isinstance(data, Mapping) else None
    try:
        values = {key: value for key, value in model.items() if key not in FOREIGN}
        model_config(values, context if isinstance(context, int) else 1, {})
    except ValueError as error:
        return mistakes(error)
    return []
