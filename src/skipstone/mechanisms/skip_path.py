"""Skip paths: the update of a token that skips a block, if it is not zero.

Shape letters: B rows, T tokens, D width, R rank.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.tokens import Tokens


class LowRankSkip(nn.Module):
    """A low-rank linear approximation of a block's update, up (down x); initially 0, because `up` is zero.

    After Informed Routing (arXiv 2510.13831), which approximates what it does not execute. There a forecast of the
    output also informs the router; here decisions do not depend on the skip path.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(rank, width))
        self.up_weight = nn.Parameter(torch.empty(width, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the first matrix, and set the second one to 0, so that the path starts without effect."""
        bound = 1 / math.sqrt(self.down_weight.shape[1])
        init.uniform_(self.down_weight, -bound, bound)
        init.zeros_(self.up_weight)

    def forward(self, x_BTD: Tensor, skipped_BT: Tensor, tokens: Tokens) -> Tensor:
        """Return the update of tokens in `skipped_BT`, [B, T, D], with the gain of outer gates; 0 for tokens that are
        no queries.

        It is computed for every token: at these ranks gathering would cost more than it saves.
        """
        skipped_BT = tokens.queries.and_mask(skipped_BT)
        update_BTD = self.guess(x_BTD)
        if tokens.gain_BT is not None:
            update_BTD = update_BTD * tokens.gain_BT[..., None].to(update_BTD.dtype)
        return torch.where(skipped_BT[..., None], update_BTD, 0.0)

    def guess(self, x: Tensor) -> Tensor:
        """Return the approximate update [..., D] of every token of x [..., D]."""
        return F.linear(F.linear(x, self.down_weight), self.up_weight)

    def flops(self, tokens: float) -> float:
        """Return the forward FLOPs for this many tokens."""
        return 2 * tokens * (self.down_weight.numel() + self.up_weight.numel())
