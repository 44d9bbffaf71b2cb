"""Parameters that weight decay leaves out, by kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from torch import nn

from skipstone.core.routing_module import RoutingModule

# A parameter of the decoder is of the first kind whose pattern its name matches; mechanisms declare their own.
PATTERNS = {"biases": r"bias", "norms": r"norm", "embeddings": r"(^|\.)(embed_tokens|positions)\."}
USUAL = ("biases", "norms", "preferences")  # also left out by common trainers


def decaying(model: nn.Module, names: Iterable[str], spared: Collection[str] | None) -> list[str]:
    """Return the names of parameters that decay, in their order. spared: kinds that do not; None: the usual ones."""
    kinds = kinds_of(model)
    return [name for name in names if kinds[name] not in (USUAL if spared is None else spared)]


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
