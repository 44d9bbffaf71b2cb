"""Floor 4: training, on transformers' Trainer.

config.py       `TrainConfig` and `Recipe`: what a run is, read strictly
decay.py        which parameters weight decay spares
run.py          `train`: from a recipe to a finished run folder
estimate.py     FLOPs, memory and hours on a named GPU, before the start
setup.py        recipe -> model configuration, model, Trainer's arguments
folder.py       a run folder while it is written
environment.py  versions, commit, machine
trainer.py      `RoutingMixin`, `RoutingTrainer` (for any training), and the trainer of `train`
callback.py     `RoutingCallback`: moves thresholds and schedules once an optimizer step
validation.py   oracle and causal loss on validation rows
meter.py        realised capacity, gates, entropies
window.py       what the next log line reports; survives a checkpoint
watch.py        metrics.jsonl, progress bar, stop signals
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from skipstone.train.callback import RoutingCallback
    from skipstone.train.trainer import RoutingMixin, RoutingTrainer

__all__ = ["RoutingCallback", "RoutingMixin", "RoutingTrainer"]


def __getattr__(name: str) -> Any:
    """These three load torch, which reading a recipe does not need."""
    if name not in __all__:
        raise AttributeError(f"module 'skipstone.train' has no attribute {name!r}")
    home = "callback" if name == "RoutingCallback" else "trainer"
    return getattr(import_module(f"skipstone.train.{home}"), name)
