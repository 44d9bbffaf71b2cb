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
    """A learned low-rank linear map, up (down x), that gives skipped tokens an approximation of the block's update.

    width: size of x. rank: size of down x. The map starts at 0. After Informed Routing (arXiv 2510.13831), where the
    approximation also informs the router; here it does not.
    """

    def __init__(self, width: int, rank: int) -> None:
        super().__init__()
        self.down_weight = nn.Parameter(torch.empty(rank, width))
        self.up_weight = nn.Parameter(torch.empty(width, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the down projection uniformly and set the up projection to 0, so that the map starts at 0."""
        bound = 1 / math.sqrt(self.down_weight.shape[1])
        init.uniform_(self.down_weight, -bound, bound)
        init.zeros_(self.up_weight)

    def forward(self, x_BTD: Tensor, skipped_BT: Tensor, tokens: Tokens) -> Tensor:
        """Return the update of skipped tokens, [B, T, D], and 0 for all others.

        x_BTD: hidden states. skipped_BT: bool, the tokens that skip the block. tokens: its `gain_BT`, the factor of
        outer gates, multiplies the update, and tokens that outer mechanisms excluded from updates (`queries`) get 0.
        The map is computed for all tokens: at ranks this small, gathering would cost more than it saves.
        """
        skipped_BT = tokens.queries.and_mask(skipped_BT)
        update_BTD = self.guess(x_BTD)
        if tokens.gain_BT is not None:
            update_BTD = update_BTD * tokens.gain_BT[..., None].to(update_BTD.dtype)
        return torch.where(skipped_BT[..., None], update_BTD, 0.0)

    def guess(self, x: Tensor) -> Tensor:
        """Return the approximate update of every token, [..., D]. x: hidden states [..., D]."""
        return F.linear(F.linear(x, self.down_weight), self.up_weight)

    def flops(self, tokens: float) -> float:
        """Return the matrix FLOPs of the forward pass over `tokens` tokens."""
        return 2 * tokens * (self.down_weight.numel() + self.up_weight.numel())
