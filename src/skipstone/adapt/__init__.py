"""Between floors 4 and 5: a dense checkpoint becomes one that computes less, and dense again.

adapt_recipe.py       `AdaptRecipe`: what an adaptation is, read strictly
adaptation.py         `adapt`: from a checkpoint to a finished run folder
plan.py               everything up to the first step
self_generated.py     text sampled from the source model, to adapt it on
source.py             the dense checkpoint, its tokenizer, another teacher
student.py            the source's weights with mechanisms that change nothing yet, and the proof of it
start.py              routers and skip paths that start from what the source does
influence.py          how much each block matters, and which to choose by it
flop_budget.py        executed FLOPs: what promises a budget, and what is reached; the package `budget` meets it
stages.py             what trains when, learning rates, adapters
distillation.py       losses against the dense model
adapt_trainer.py      the trainer of `skipstone train` with all this
export.py             back to a checkpoint of transformers' own classes
harden.py             PolyGLU's neurons each with one activation for good, and no router
prune.py              neuron groups that calibration rows never use are cut out of the weights
export_calibrated.py  what these two share
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.adapt.adaptation import adapt

__all__ = ["adapt"]


def __getattr__(name: str) -> object:
    """Load the trainer when something is adapted: exports need none."""
    if name != "adapt":
        raise AttributeError(f"module 'skipstone.adapt' has no attribute {name!r}")
    from skipstone.adapt.adaptation import adapt

    return adapt
