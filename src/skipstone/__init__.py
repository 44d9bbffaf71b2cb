"""Conditional computation for transformers that really saves the computation.

Importing the package loads neither torch nor transformers: names are loaded when they are used, and the models register
with transformers' Auto classes as soon as these are loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from skipstone import registration

if TYPE_CHECKING:
    from skipstone import presets
    from skipstone.budget import BudgetTable, calibrate
    from skipstone.in_place import route
    from skipstone.mechanisms import EarlyExit, GateSkip, MixtureOfDepths, PolyGLU, TokenSelective
    from skipstone.model.causal_lm import SkipstoneForCausalLM
    from skipstone.model.classifier import SkipstoneForSequenceClassification
    from skipstone.model.config import SkipstoneConfig
    from skipstone.model.decoder import SkipstoneModel
    from skipstone.nn.routed import Routed

__version__ = "0.2.0"

__all__ = [
    "BudgetTable",
    "EarlyExit",
    "GateSkip",
    "MixtureOfDepths",
    "PolyGLU",
    "Routed",
    "SkipstoneConfig",
    "SkipstoneForCausalLM",
    "SkipstoneForSequenceClassification",
    "SkipstoneModel",
    "TokenSelective",
    "calibrate",
    "presets",
    "route",
]

_NAMES_OF = {
    "skipstone.presets": ["presets"],
    "skipstone.budget": ["BudgetTable", "calibrate"],
    "skipstone.in_place": ["route"],
    "skipstone.mechanisms": ["EarlyExit", "GateSkip", "MixtureOfDepths", "PolyGLU", "TokenSelective"],
    "skipstone.model.causal_lm": ["SkipstoneForCausalLM"],
    "skipstone.model.classifier": ["SkipstoneForSequenceClassification"],
    "skipstone.model.config": ["SkipstoneConfig"],
    "skipstone.model.decoder": ["SkipstoneModel"],
    "skipstone.nn.routed": ["Routed"],
}


def __getattr__(name: str) -> object:
    for module, names in _NAMES_OF.items():
        if name in names:
            home = import_module(module)
            globals()[name] = value = home if name == "presets" else getattr(home, name)
            return value
    raise AttributeError(f"module 'skipstone' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


registration.register()
