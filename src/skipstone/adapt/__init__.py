"""Between floors 4 and 5: a dense checkpoint becomes one that computes less, and dense again.

config.py        `AdaptRecipe`: what an adaptation is, read strictly
run.py           `adapt`: from a checkpoint to a finished run folder
plan.py          everything up to the first step
written.py       text that the source writes, to adapt it on
source.py        the dense checkpoint, its tokenizer, another teacher
student.py       the source's weights with mechanisms that change nothing yet, and the proof of it
start.py         routers and skip paths that start from what the source does
influence.py     how much each block matters, and which to choose by it
budget.py        executed FLOPs: what promises them, what is reached; the package `budget` has what meets them
stages.py        what trains when, learning rates, adapters
distillation.py  losses against the dense model
trainer.py       the trainer of `skipstone train` with all this
export.py        back to a checkpoint of transformers' own classes
harden.py        PolyGLU's neurons each with one activation for good, and no router
prune.py         neuron groups that calibration rows never use are cut out of the weights
calibrated.py    what these two share
"""

from __future__ import annotations
