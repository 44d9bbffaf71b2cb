"""Code that gates share: a factor on the update, soft in training; in hard execution tokens are skipped.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.core.records import Records
from skipstone.core.seam import Update
from skipstone.core.tokens import Tokens


def is_hard(execution: str, tokens: Tokens) -> bool:
    """Return whether this pass skips tokens: a causal pass of a hard gate, or any pass with forced decisions."""
    return tokens.forced_BT is not None or (execution == "hard" and tokens.mode.routing == "causal")


def gate(
    update: Update,
    x_BTD: Tensor,
    tokens: Tokens,
    open_BT: Tensor | None,
    kept_BT: Tensor | None,
    share: float | None = None,
) -> tuple[Tensor, Records]:
    """Compute the update with gain `open_BT` (None: 1), for the tokens `kept_BT` only (None: all).

    share: long-run share of kept tokens, if known.
    """
    if open_BT is not None:
        tokens = tokens.scaled(open_BT)
    return update(x_BTD, tokens if kept_BT is None else tokens.restrict_queries(kept_BT, share=share))


def straight_through(open_BT: Tensor, gain_BT: Tensor | None, kept_BT: Tensor) -> Tensor:
    """Return the gains of a hard pass, `gain_BT` (None: 1) or 0, with the gradient of `open_BT` for every token.

    The gate of a skipped token thus gets a gradient from its update, which therefore has to be computed.
    """
    value_BT = torch.where(kept_BT, 1.0 if gain_BT is None else gain_BT, 0.0).detach()
    return value_BT + (open_BT - open_BT.detach())
