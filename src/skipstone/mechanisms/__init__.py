"""The mechanisms, one file each: what decides which tokens, neurons or activations a block computes.

They import `ops` and `core`, but nothing of blocks (floor 2 in docs/architecture.md).

To add one, write a file and add a line to one of the tables below.
"""

from __future__ import annotations

from skipstone.core.routing_module import Placement, RoutingModule
from skipstone.mechanisms.base import DepthMechanism
from skipstone.mechanisms.dynamic_chunking import DynamicChunking
from skipstone.mechanisms.early_exit import EarlyExit
from skipstone.mechanisms.gate_skip import GateSkip
from skipstone.mechanisms.layer_dropout import LayerDropout
from skipstone.mechanisms.magnitude import MagnitudeGroups
from skipstone.mechanisms.mixture_of_depths import MixtureOfDepths
from skipstone.mechanisms.neuron_groups import NeuronGroups
from skipstone.mechanisms.polyglu import PolyGLU
from skipstone.mechanisms.segment import Segment
from skipstone.mechanisms.token_selective import TokenSelective
from skipstone.mechanisms.zeros import ZeroNeurons

DEPTH: dict[str, type[DepthMechanism]] = {
    "mixture_of_depths": MixtureOfDepths,
    "token_selective": TokenSelective,
    "early_exit": EarlyExit,
    "gate_skip": GateSkip,
    "segment": Segment,
    "layer_dropout": LayerDropout,
    "dynamic_chunking": DynamicChunking,
}

ACTIVATION: dict[str, type[PolyGLU]] = {
    "polyglu": PolyGLU,
}


def register(name: str, mechanism: type[DepthMechanism]) -> None:
    """Register a depth mechanism, a class that decides which tokens get a block's update, for use in configurations.

    name: the value of `name` in an entry of `SkipstoneConfig.mechanisms`. mechanism: the class. Call this before
    loading a model that uses it. Raises ValueError if the name is taken, and TypeError if the class is not a
    `DepthMechanism` with a `Config`.
    """
    if name in DEPTH:
        raise ValueError(f"mechanism {name!r} is registered already")
    if not (isinstance(mechanism, type) and issubclass(mechanism, DepthMechanism) and hasattr(mechanism, "Config")):
        raise TypeError(f"mechanism {name!r} must be a subclass of DepthMechanism with a Config, got {mechanism!r}")
    DEPTH[name] = mechanism


# Routers of neuron groups, by the option `decision` of `neuron_groups`.
GROUPS: dict[str, type[NeuronGroups] | type[MagnitudeGroups] | type[ZeroNeurons]] = {
    "learned": NeuronGroups,
    "random": NeuronGroups,
    "magnitude": MagnitudeGroups,
    "zeros": ZeroNeurons,
}

__all__ = [
    "ACTIVATION",
    "DEPTH",
    "GROUPS",
    "DepthMechanism",
    "DynamicChunking",
    "EarlyExit",
    "GateSkip",
    "LayerDropout",
    "MagnitudeGroups",
    "MixtureOfDepths",
    "NeuronGroups",
    "Placement",
    "PolyGLU",
    "RoutingModule",
    "Segment",
    "TokenSelective",
    "ZeroNeurons",
    "register",
]
