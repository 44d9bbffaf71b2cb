"""The seam between blocks and depth mechanisms: a mechanism is a function on updates.

    Update    = (x, tokens) -> (delta, records)
    mechanism : (update, x, tokens) -> (delta, records)

`records` are the decisions of mechanisms, by mechanism name. `update` computes what a block (or one of its sub-layers)
adds to the residual stream. A mechanism may give it fewer tokens and scale or drop what it returns; it knows nothing of
what the update computes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from torch import Tensor

from skipstone.core.records import Records
from skipstone.core.tokens import Tokens

Update: TypeAlias = Callable[[Tensor, Tokens], tuple[Tensor, Records]]
Mechanism: TypeAlias = Callable[[Update, Tensor, Tokens], tuple[Tensor, Records]]


def wrap(update: Update, mechanisms: Iterable[Mechanism]) -> Update:
    """Return `update` wrapped in depth mechanisms, the first of which is outermost and decides first.

    update: a function (x, tokens) -> (delta, records) that computes what a block adds to the residual stream: from x
    [B, T, D] (rows, tokens, width), delta of the same shape, and the decisions made, by mechanism name. mechanisms:
    functions (update, x, tokens) -> (delta, records). The result has the signature of `update`.
    """
    for mechanism in reversed(list(mechanisms)):
        update = partial(mechanism, update)
    return update
