"""The stages of an adaptation: the parameters that each trains, their learning rates, and LoRA adapters for some."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from skipstone.adapt.adapt_recipe import LORA, Lora, Stage
from skipstone.core.strict import PlainDict
from skipstone.model.causal_lm import SkipstoneForCausalLM

ADAPTER = "default"
TRAINED = {"routers": ("routers",), LORA: ("routers", "lora"), "all": ("routers", "weights")}


def roles(model: SkipstoneForCausalLM) -> dict[str, str]:
    """Return the role of each parameter of `model` by its name: "routers", "lora" or "weights".

    All parameters of mechanisms are "routers", those of LoRA adapters "lora", all others "weights".
    """
    routers = {id(p) for mechanism in model.routing_modules() for p in mechanism.parameters()}
    return {
        name: "routers" if id(p) in routers else "lora" if ".lora_" in name else "weights"
        for name, p in model.named_parameters()
    }


def stage_at(stages: Sequence[Stage], step: int) -> tuple[Stage, int]:
    """Return the stage (part of an adaptation) to which an optimizer step belongs, and the step's index within it.

    stages: the stages in order, with every field filled in (`read_recipe`). step: index of the optimizer step, counted
    from 0 over all stages; beyond the last stage, that stage and its last step are returned.
    """
    for stage in stages:
        assert stage.steps is not None
        if step < stage.steps:
            return stage, step
        step -= stage.steps
    return stages[-1], (stages[-1].steps or 1) - 1


def rate(stages: Sequence[Stage], role: str, min_ratio: float, step: int) -> float:
    """Return the learning rate of a group of parameters at an optimizer step.

    In each stage the rate warms up linearly to the stage's peak and decays by cosine to `min_ratio` times the peak.
    stages: the stages in order, with every field filled in (`read_recipe`). role: "routers" uses the stage's
    router_learning_rate, "weights" and "lora" its learning_rate. step: index of the optimizer step, counted from 0 over
    all stages.
    """
    stage, at = stage_at(stages, step)
    top = stage.router_learning_rate if role == "routers" else stage.learning_rate
    assert top is not None
    assert stage.steps is not None
    warmup = stage.warmup_steps or 0
    if at < warmup:
        return top * (at + 1) / warmup
    fallen = (1 - math.cos(math.pi * (at - warmup) / max(stage.steps - warmup, 1))) / 2
    return top * (1 - fallen + min_ratio * fallen)


def groups(model: SkipstoneForCausalLM, stages: Sequence[Stage], weight_decay: float) -> Iterator[PlainDict]:
    """Yield optimizer groups of all parameters that some stage trains, by role and by whether weight decay applies.

    Roles are "routers" (parameters of mechanisms), "lora" (adapters) and "weights" (all others). model: the model,
    which has adapters if a stage trains some. stages: the stages in order. weight_decay: weight decay of matrices;
    biases, norms and adapters have none. Each group has `params`, `lr` (1, which `schedule` multiplies), `weight_decay`
    and `role`; Trainer logs the learning rate of the first group.
    """
    used = {role for stage in stages for role in TRAINED[stage.train_only or "all"]}
    named = roles(model)
    for role in ("weights", "lora", "routers"):
        for decays in (True, False):
            chosen = [p for n, p in model.named_parameters() if named[n] == role and _decays(n, p) == decays]
            if chosen and role in used:
                yield {"params": chosen, "lr": 1.0, "weight_decay": weight_decay if decays else 0.0, "role": role}


def _decays(name: str, parameter: nn.Parameter) -> bool:
    """Return whether weight decay applies: to matrices, but not to biases, norms and adapters, which start at 0."""
    return parameter.dim() > 1 and not name.endswith("bias") and "norm." not in name and ".lora_" not in name


def schedule(optimizer: torch.optim.Optimizer, stages: Sequence[Stage], min_ratio: float) -> LambdaLR:
    """Return the learning rate schedule of an adaptation's optimizer.

    In each stage the rates warm up linearly to the stage's peaks and decay by cosine. optimizer: its groups are those
    that `groups` yields, each with its `role`. stages: the stages in order, with every field filled in (`read_recipe`).
    min_ratio: the rate at the end of a stage, divided by the peak.
    """
    functions: list[Callable[[int], float]] = [
        partial(rate, stages, group["role"], min_ratio) for group in optimizer.param_groups
    ]
    return torch.optim.lr_scheduler.LambdaLR(optimizer, functions)


def unfreeze(model: SkipstoneForCausalLM, stage: Stage) -> None:
    """Enable gradients for the parameters of `model` that a stage of its adaptation trains, and for no others.

    stage: the stage; its `train_only` names the parameters.
    """
    trained, named = TRAINED[stage.train_only or "all"], roles(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(named[name] in trained)


def check(model: SkipstoneForCausalLM, stages: Sequence[Stage], together: bool) -> None:
    """Raise ValueError if stages train nothing, or train different weights where that is not possible.

    stages: the adaptation's phases in order, each with its own trained weights and learning rates. together: whether
    several processes train the model, or it is sharded; all stages must then train the same weights. Nothing is trained
    if every stage trains routers only and the model has no mechanism.
    """
    if all(stage.train_only == "routers" for stage in stages) and not any(model.routing_modules()):
        raise ValueError("train_only 'routers' trains nothing: the recipe's model has no mechanism")
    if together and len({stage.train_only for stage in stages}) > 1:
        raise ValueError(
            "stages that train different weights need one process and train.parallel=ddp: what is shared between "
            "processes is fixed by the first of them"
        )


def needs_adapters(stages: Sequence[Stage]) -> bool:
    """Return whether any of an adaptation's stages trains LoRA adapters, so that they have to be added to the model."""
    return any(stage.train_only == LORA for stage in stages)


def check_packages(stages: Sequence[Stage]) -> None:
    """Raise ValueError if one of `stages` needs the package PEFT (for adapters) and it is not installed."""
    if needs_adapters(stages) and importlib.util.find_spec("peft") is None:
        raise ValueError(f"train_only {LORA!r} needs a package: pip install 'skipstone[peft]'")


def add_adapters(model: SkipstoneForCausalLM, lora: Lora) -> Any:
    """Add PEFT's LoRA adapters to every projection of the blocks, in place, and return PEFT's tuner.

    The output of the adapters is zero at first, so the model computes the same as before. lora: their rank, scale and
    dropout.
    """
    from peft import LoraConfig, LoraModel

    blocks = model.model.layers
    targets = {n.rpartition(".")[2] for n, m in blocks.named_modules() if isinstance(m, nn.Linear)}
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=sorted(targets), bias="none"
    )
    return LoraModel(model, {ADAPTER: config}, ADAPTER)


def merge_adapters(model: SkipstoneForCausalLM, tuner: Any) -> None:
    """Merge the LoRA adapters into the weights in place, which leaves an ordinary model.

    tuner: the object of PEFT that `add_adapters` returned for this model.
    """
    tuner.merge_and_unload()
    assert not hasattr(model, "peft_config")
