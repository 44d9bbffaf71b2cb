"""Which parameters weight decay applies to, by kind, and a learning rate of their own for routers."""

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
    """Return those of `names` (parameter names of `model`) to which weight decay applies, in the same order.

    spared: the kinds of parameters without weight decay, out of "biases", "norms", "embeddings", "preferences" (of
    PolyGLU's neurons) and "routers"; None means biases, norms and preferences. The matrices of attention and MLP always
    decay.
    """
    kinds = kinds_of(model)
    return [name for name in names if kinds[name] not in (USUAL if spared is None else spared)]


def with_router_rate(groups: Iterable[PlainDict], model: nn.Module, rate: float) -> list[PlainDict]:
    """Return optimizer groups in which the parameters of depth mechanisms have their own learning rate.

    Depth mechanisms let tokens skip blocks. groups: torch's parameter groups, each with `params`. model: the model that
    owns the parameters. rate: the learning rate of its depth mechanisms' parameters. Each group is split in two, with
    its other options copied. The groups of depth mechanisms come last, and groups without parameters are left out.
    """
    own = {id(p) for module in model.modules() if isinstance(module, DepthModule) for p in module.parameters()}
    found: tuple[list[PlainDict], list[PlainDict]] = ([], [])
    for group in groups:
        for theirs in (False, True):
            chosen = [p for p in group["params"] if (id(p) in own) == theirs]
            if chosen:
                found[theirs].append({**group, "params": chosen, **({"lr": rate} if theirs else {})})
    return [*found[0], *found[1]]


def kinds_of(model: nn.Module) -> dict[str, str | None]:
    """Return the kind of each parameter of a model, by parameter name; a recipe leaves out weight decay by kind.

    Kinds are "biases", "norms", "embeddings", and those that mechanisms declare ("preferences", "routers"). The kind is
    None for parameters that always decay: the matrices of attention and MLP and an untied output head.
    """
    kinds = {name: _kind(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    for prefix, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RoutingModule):
            for name, _ in module.named_parameters():
                kinds[f"{prefix}.{name}"] = module.decay_kind(name)
    return kinds


def _kind(name: str) -> str | None:
    return next((kind for kind, pattern in PATTERNS.items() if re.search(pattern, name)), None)
