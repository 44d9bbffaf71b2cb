"""Parameters that weight decay leaves out, by kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from skipstone.core.depth import DepthModule
from skipstone.core.routing_module import RoutingModule
from skipstone.core.strict import PlainDict

# A parameter of the decoder is of the first kind whose pattern its name matches; mechanisms declare their own.
PATTERNS = {"biases": r"bias", "norms": r"norm", "embeddings": r"(^|\.)(embed_tokens|positions)\."}
USUAL = ("biases", "norms", "preferences")  # also left out by common trainers


def decaying(model: nn.Module, names: Iterable[str], spared: Collection[str] | None) -> list[str]:
    """Return the names of parameters that decay, in their order. spared: kinds that do not; None: the usual ones."""
    kinds = kinds_of(model)
    return [name for name in names if kinds[name] not in (USUAL if spared is None else spared)]


def with_router_rate(groups: Iterable[PlainDict], model: nn.Module, rate: float) -> list[PlainDict]:
    """Return optimizer groups with the parameters of depth mechanisms in groups of their own, last, at another rate."""
    own = {id(p) for module in model.modules() if isinstance(module, DepthModule) for p in module.parameters()}
    found: tuple[list[PlainDict], list[PlainDict]] = ([], [])
    for group in groups:
        for theirs in (False, True):
            chosen = [p for p in group["params"] if (id(p) in own) == theirs]
            if chosen:
                found[theirs].append({**group, "params": chosen, **({"lr": rate} if theirs else {})})
    return [*found[0], *found[1]]


def kinds_of(model: nn.Module) -> dict[str, str | None]:
    """Return the kind of each parameter by name; None for those that always decay.

    These are the matrices of attention, MLP and an untied head.
    """
    kinds = {name: _kind(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RoutingModule):
            for name, _ in module.named_parameters():
                kinds[f"{prefix}.{name}"] = module.decay_kind(name)
    return kinds


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name)), None)
