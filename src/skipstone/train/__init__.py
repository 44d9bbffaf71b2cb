"""Floor 4: training, on transformers' Trainer.

recipe.py       `TrainConfig` and `Recipe`: what a run is, read strictly
early.py        all mistakes of a recipe that can be told before torch is loaded
decay.py        which parameters weight decay spares
training.py     `train`: from a recipe to a finished run folder
estimate.py     FLOPs, memory and hours on a named GPU, before the start
setup.py        recipe -> model configuration, model, Trainer's arguments
folder.py       a run folder while it is written
environment.py  versions, commit, machine
trainer.py      `RoutingMixin`, `RoutingTrainer` (for any training), and the trainer of `train`
callback.py     `RoutingCallback`: moves thresholds and schedules once an optimizer step
validation.py   oracle and causal loss on validation rows
log_window.py   what the next log line reports; survives a checkpoint
watch.py        metrics.jsonl, progress bar, stop signals
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.train.callback import RoutingCallback
    from skipstone.train.trainer import RoutingMixin, RoutingTrainer
    from skipstone.train.training import train

__all__ = ["RoutingCallback", "RoutingMixin", "RoutingTrainer", "train"]

_HOMES = {"RoutingCallback": "callback", "RoutingMixin": "trainer", "RoutingTrainer": "trainer", "train": "training"}


def __getattr__(name: str) -> object:
    """Load what needs torch when it is asked for: reading a recipe does not."""
    if name not in _HOMES:
        raise AttributeError(f"module 'skipstone.train' has no attribute {name!r}")
    return getattr(import_module(f"skipstone.train.{_HOMES[name]}"), name)
