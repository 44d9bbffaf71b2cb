"""What all gate mechanisms use, those that multiply a block's update for each token by a factor, the gate.

In soft passes, such as those of training, every token is computed and scaled. In hard passes, tokens with low gates are
skipped.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.core.records import Records
from skipstone.core.seam import Update
from skipstone.core.tokens import Tokens


def is_hard(execution: str, tokens: Tokens) -> bool:
    """Return whether a pass of a gate skips tokens instead of only scaling their updates.

    execution: the option of the gate, "hard" or "soft". tokens: the tokens of the pass, whose `mode` tells how it
    decides. A pass skips tokens if execution is "hard" and its decisions are causal (made without later tokens, as in
    generation), or if the caller imposes decisions (`tokens.forced_BT`).
    """
    return tokens.forced_BT is not None or (execution == "hard" and tokens.mode.routing == "causal")


def apply_gate(
    update: Update,
    x_BTD: Tensor,
    tokens: Tokens,
    open_BT: Tensor | None,
    kept_BT: Tensor | None,
    share: float | None = None,
) -> tuple[Tensor, Records]:
    """Return a gated block's update, [B, T, D], and the decisions recorded inside the block, by name.

    update: computes what the wrapped block adds to its input; called once as update(x_BTD, tokens) with the gates set
    in `tokens`. x_BTD: the hidden states that enter the block. tokens: the tokens of this call. open_BT: factor on the
    updates of attention and MLP; None means 1. kept_BT: bool, the tokens whose update is computed; the others have
    update 0 and still provide keys and values. None means all tokens. share: the long-run share of kept tokens, if
    known; batched decoding uses it to decide whether leaving out rows saves time.
    """
    if open_BT is not None:
        tokens = tokens.scaled(open_BT)
    return update(x_BTD, tokens if kept_BT is None else tokens.restrict_queries(kept_BT, share=share))


def straight_through(open_BT: Tensor, gain_BT: Tensor | None, kept_BT: Tensor) -> Tensor:
    """Return factors on updates with the values of a pass that skips tokens and the gradient of the soft gates.

    The result is fp32 [B, T]. open_BT: soft gates in (0, 1), which receive the gradient. gain_BT: the factor for a kept
    token; None means 1. kept_BT: bool; the factor for other tokens is 0. Their gates get a gradient too, so their
    updates have to be computed as well.
    """
    value_BT = torch.where(kept_BT, 1.0 if gain_BT is None else gain_BT, 0.0).detach()
    return value_BT + (open_BT - open_BT.detach())
