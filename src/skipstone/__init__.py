"""Conditional computation for transformers that really saves the computation.

Importing the package registers its models with transformers' Auto classes. The `skipstone` command defers this, so that
it can report mistakes on the command line before it loads torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from typing import TYPE_CHECKING

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


def _is_command() -> bool:
    """Return whether this process is the `skipstone` command, started as a script or by `python -m skipstone`."""
    if sys.argv[:1] == ["-m"] and "-m" in sys.orig_argv:  # what runpy leaves there while it looks for the module
        return sys.orig_argv[sys.orig_argv.index("-m") + 1 :][:1] == ["skipstone"]
    return getattr(sys.modules.get("skipstone_cli"), "running", False)


if not _is_command():
    for _name in __all__:
        __getattr__(_name)
