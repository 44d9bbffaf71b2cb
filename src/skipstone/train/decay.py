"""Which parameters weight decay spares, by kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from skipstone.core.routing_module import RoutingModule

# A parameter of the decoder itself is of the first kind whose pattern its name has; mechanisms declare theirs.
PATTERNS = {"biases": r"bias", "norms": r"norm", "embeddings": r"(^|\.)(embed_tokens|positions)\."}
USUAL = ("biases", "norms", "preferences")  # what stock trainers spare, too


def decaying(model: nn.Module, names: Iterable[str], spared: Collection[str] | None) -> list[str]:
    """Return the names of parameters that are of no spared kind, in their order. None: the usual kinds are spared."""
    kinds = kinds_of(model)
    return [name for name in names if kinds[name] not in (USUAL if spared is None else spared)]


def kinds_of(model: nn.Module) -> dict[str, str | None]:
    """Return the kind of each parameter by name; None for those that always decay: the matrices of attention, MLP and
    an untied head.
    """
    kinds = {name: _kind(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RoutingModule):
            for name, _ in module.named_parameters():
                kinds[f"{prefix}.{name}"] = module.decay_kind(name)
    return kinds


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name)), None)
