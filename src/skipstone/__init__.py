"""Conditional computation for transformers that really saves the computation.

Importing the package registers its models with transformers' Auto classes.
"""

from __future__ import annotations

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from skipstone import presets
from skipstone.mechanisms import EarlyExit, GateSkip, MixtureOfDepths, PolyGLU, TokenSelective
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.decoder import SkipstoneModel
from skipstone.nn.routed import Routed

__version__ = "0.1.0"

AutoConfig.register("skipstone", SkipstoneConfig, exist_ok=True)
AutoModel.register(SkipstoneConfig, SkipstoneModel, exist_ok=True)
AutoModelForCausalLM.register(SkipstoneConfig, SkipstoneForCausalLM, exist_ok=True)

__all__ = [
    "EarlyExit",
    "GateSkip",
    "MixtureOfDepths",
    "PolyGLU",
    "Routed",
    "SkipstoneConfig",
    "SkipstoneForCausalLM",
    "SkipstoneModel",
    "TokenSelective",
    "presets",
]
