"""Training of a model by a recipe, on transformers' Trainer.

recipe.py       `TrainConfig` and `Recipe`: the definition of a run, parsed strictly
early.py        checks of a recipe that do not load torch
decay.py        the parameters that weight decay leaves out, and the learning rate of routers
training.py     `train`: trains a recipe into a run folder
estimate.py     estimates FLOPs, memory and hours on a named GPU
plan.py         estimates all that for many GPUs, with the bytes sent between them
setup.py        builds model configuration, model and Trainer's arguments from a recipe
folder.py       writes run folders
environment.py  versions, commit, machine
mixin.py        `RoutingMixin`, `RoutingTrainer`: for any training
seen.py         collects the records of a model's forward passes for mixin.py
trainer.py      the trainer of `train`
callback.py     `RoutingCallback`: advances thresholds and schedules once per optimizer step
benefit.py      measures what a block's update of a token is worth
average.py      `TailAverage`: the mean of the last steps' weights
finite.py       `FiniteGuard`: stops before a number that is not finite reaches a checkpoint
router_watch.py `RouterWatch`: warns of routers that are dead, saturated or no better than chance
validation.py   oracle and causal loss on validation rows
log_window.py   sums for the next log line, saved in checkpoints
checkpoints.py  checks checkpoints before a run is resumed from one
sharded.py      checkpoints of a sharded model
parallel.py     several processes: DDP and FSDP2
same_state.py   `SameState`: checks that all processes hold equal values
peers.py        ends this process soon after another one has failed
best.py         `KeepBest`: keeps the model of the lowest validation loss
watch.py        metrics.jsonl, progress bar, stop signals
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.train.callback import RoutingCallback
    from skipstone.train.mixin import RoutingMixin, RoutingTrainer
    from skipstone.train.training import train

__all__ = ["RoutingCallback", "RoutingMixin", "RoutingTrainer", "train"]

_HOMES = {"RoutingCallback": "callback", "RoutingMixin": "mixin", "RoutingTrainer": "mixin", "train": "training"}


def __getattr__(name: str) -> object:
    """Import names that need torch on first use; reading a recipe does not need it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'skipstone.train' has no attribute {name!r}")
    return getattr(import_module(f"skipstone.train.{_HOMES[name]}"), name)
