"""Adaptation of dense checkpoints so that they compute less, and export of models back to dense checkpoints.

adapt_recipe.py       `AdaptRecipe`: the options of an adaptation, read strictly
adaptation.py         `adapt`: from a checkpoint to a finished run folder
plan.py               preparation of everything before the first step
self_generated.py     text sampled from the source model, to adapt it on
source.py             loading of the dense checkpoint, its tokenizer, and a teacher to distil from
student.py            the source's weights with mechanisms that change nothing yet, and the check of it
start.py              routers and skip paths fitted to the source
influence.py          how much each block changes the residual stream, and the choice of blocks by it
flop_budget.py        capacities and thresholds for a budget of executed FLOPs, and the FLOPs reached
stages.py             trained parameters, learning rates and adapters of each stage
distillation.py       losses against the dense model
adapt_trainer.py      the trainer of `skipstone train` with stages, distillation and a budget loss
export.py             export to a dense checkpoint of an architecture that transformers has
export_quantised.py   export with weights in 16, 8 or 4 bits
harden.py             conversion of PolyGLU to one fixed activation per neuron, without a router
prune.py              removal of neuron groups that calibration rows never use
export_calibrated.py  common code of harden.py and prune.py
draft_head.py         training of a draft head, which guesses the model's next tokens
draft_head_run.py     training of a draft head for the folder of a run or saved model
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
