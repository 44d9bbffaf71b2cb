"""Conditional computation for transformers that really saves the computation.

Importing the package registers its models with transformers' Auto classes.
"""

from __future__ import annotations

import sys
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from skipstone import presets
from skipstone.budget import BudgetTable, calibrate
from skipstone.mechanisms import EarlyExit, GateSkip, MixtureOfDepths, PolyGLU, TokenSelective
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.classifier import SkipstoneForSequenceClassification
from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import SkipstoneModel
from skipstone.nn.routed import Routed

__version__ = "0.1.0"

AutoConfig.register("skipstone", SkipstoneConfig, exist_ok=True)
AutoModel.register(SkipstoneConfig, SkipstoneModel, exist_ok=True)
AutoModelForCausalLM.register(SkipstoneConfig, SkipstoneForCausalLM, exist_ok=True)
AutoModelForSequenceClassification.register(SkipstoneConfig, SkipstoneForSequenceClassification, exist_ok=True)
# `transformers serve` looks for the class in transformers, by its name. Not `import transformers`: while 5.23 is being
# imported it replaces itself by a second module, which is the one that the server will see.
_transformers: Any = sys.modules["transformers"]
_transformers.SkipstoneForCausalLM = SkipstoneForCausalLM

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
]
