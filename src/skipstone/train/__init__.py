"""Training of a model by a recipe, on transformers' Trainer.

recipe.py       `TrainConfig` and `Recipe`: the definition of a run, parsed strictly
early.py        checks of a recipe that do not load torch
decay.py        the parameters that weight decay leaves out
training.py     `train`: trains a recipe into a run folder
estimate.py     estimates FLOPs, memory and hours on a named GPU
setup.py        builds model configuration, model and Trainer's arguments from a recipe
folder.py       writes run folders
environment.py  versions, commit, machine
mixin.py        `RoutingMixin`, `RoutingTrainer`: for any training; seen.py shows them its passes
trainer.py      the trainer of `train`
callback.py     `RoutingCallback`: advances thresholds and schedules once per optimizer step
validation.py   oracle and causal loss on validation rows
log_window.py   sums for the next log line, saved in checkpoints
checkpoints.py  checks checkpoints before a run is resumed from one
best.py         `KeepBest`: keeps the model of the lowest validation loss
environment.py  versions, commit, machine
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
