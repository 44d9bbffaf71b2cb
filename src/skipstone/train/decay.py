"""Which parameters weight decay spares, by kind."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from skipstone.core.strict import unknown

# A parameter is of the first kind whose pattern its name has.
KINDS = {
    "preferences": r"\.preference_bias$",  # of PolyGLU's neurons, for an activation
    "biases": r"bias",
    "norms": r"norm",
    "embeddings": r"(^|\.)(embed_tokens|positions)\.",  # of tokens and positions; a tied head is one of them
    "routers": r"\.mechanisms\.|\.activation\.|\.mlp\.router\.",  # all else that mechanisms own
}
USUAL = ("biases", "norms", "preferences")  # what stock trainers spare, too


def check(kinds: Iterable[str]) -> None:
    """Raise ValueError for a kind that does not exist."""
    for kind in kinds:
        if kind not in KINDS:
            raise ValueError(unknown("no_decay", kind, KINDS))


def decaying(names: Iterable[str], spared: Collection[str] | None) -> list[str]:
    """The names of parameters that are of no spared kind, in their order. None: the usual kinds are spared."""
    return [name for name in names if kind_of(name) not in (USUAL if spared is None else spared)]


def kind_of(name: str) -> str | None:
    """None for the matrices of attention, MLP and an untied head, which always decay."""
    return next((kind for kind, pattern in KINDS.items() if re.search(pattern, name)), None)
