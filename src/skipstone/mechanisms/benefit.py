"""A router that learns what its block is worth: its score predicts the measured benefit of the block's update.

    benefit_i = loss_i without the update of token i - loss_i with it        in nats, of the prediction at token i
    auxiliary loss = Huber(score_i, benefit_i)                               on the tokens where it was measured

The alternative, `guidance`, favours tokens with a large gradient of the loss, but the gradient is also large where the
next token cannot be predicted at all; the benefit is what the update really changes. A trainer measures it in two
passes over a few rows, which keep one random half of the tokens each (`train/benefit.py`), and stores it in the model
before the training pass. The router reads the detached stream.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.tokens import BENEFIT, Tokens


def benefit_loss(score_BT: Tensor, tokens: Tokens, layer: int) -> Tensor:
    """Return a loss per token, fp32 [B, T], that trains router scores to predict a block's measured benefit.

    A token's benefit is the number of nats by which its loss falls because the block updates it; a trainer measures it
    and stores it in `tokens.state` under `BENEFIT` with the index `layer` of the block, NaN where it was not measured.
    score_BT: the scores, fp32. The loss is the Huber loss between score and benefit, 0 for unmeasured tokens, scaled so
    that its mean over all tokens equals the mean over the measured ones. It is 0 everywhere if nothing was measured.
    """
    benefit_BT = tokens.state.get(BENEFIT.format(layer=layer))
    if benefit_BT is None:
        return score_BT * 0.0
    known_BT = benefit_BT.isfinite()
    target_BT = torch.where(known_BT, benefit_BT, 0.0).to(score_BT.dtype)
    loss_BT = F.huber_loss(score_BT, target_BT, reduction="none")
    return torch.where(known_BT, loss_BT, 0.0) * (known_BT.numel() / known_BT.sum().clamp(min=1))
