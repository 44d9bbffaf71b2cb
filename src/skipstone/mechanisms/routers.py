"""Routers: from a token's hidden state to its score, always in fp32.

They hold bare parameters instead of nn.Linear, so that adapters and quantisers that take every Linear leave them alone.
Shape letters: B rows, T tokens, D width, R hidden width of the router.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in fp32 whatever the types and whatever autocast says."""
    if not torch.is_autocast_enabled(x.device.type):  # the context below costs as much as a small product
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    with torch.autocast(x.device.type, enabled=False):
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float())


class LinearRouter(nn.Module):
    """score = w . x (Mixture-of-Depths, arXiv 2404.02258, section 3.4), with an optional start bias."""

    def __init__(self, width: int, start_bias: float | None = None) -> None:
        super().__init__()
        self.start_bias = start_bias
        self.weight = nn.Parameter(torch.empty(1, width))
        self.score_bias = None if start_bias is None else nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.weight.shape[1])
        init.uniform_(self.weight, -bound, bound)
        if self.score_bias is not None:
            init.constant_(self.score_bias, self.start_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """fp32 score [B, T]."""
        return linear_fp32(x_BTD, self.weight, self.score_bias).squeeze(-1)

    def constant(self, score: float) -> None:
        """Score every token the same, the weights' gradients alive."""
        with torch.no_grad():
            self.weight.zero_()
            if self.score_bias is not None:
                self.score_bias.fill_(score)

    def flops(self, tokens: float) -> float:
        return 2 * tokens * self.weight.shape[1]


class MLPRouter(nn.Module):
    """score = w2 . relu(W1 x + b1) + b2 (Token-Selective Attention, arXiv 2605.05222, equation of the router)."""

    def __init__(self, width: int, hidden: int, start_bias: float = 0.0) -> None:
        super().__init__()
        self.start_bias = start_bias
        self.hidden_weight = nn.Parameter(torch.empty(hidden, width))
        self.hidden_bias = nn.Parameter(torch.empty(hidden))
        self.weight = nn.Parameter(torch.empty(1, hidden))
        self.score_bias = nn.Parameter(torch.empty(1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """torch's own default for nn.Linear, but the last bias, which sets how open the gate starts."""
        hidden, width = self.hidden_weight.shape
        for parameter, fan in ((self.hidden_weight, width), (self.hidden_bias, width), (self.weight, hidden)):
            init.uniform_(parameter, -1 / math.sqrt(fan), 1 / math.sqrt(fan))
        init.constant_(self.score_bias, self.start_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """fp32 score [B, T]."""
        hidden_BTR = linear_fp32(x_BTD, self.hidden_weight, self.hidden_bias).relu()
        return linear_fp32(hidden_BTR, self.weight, self.score_bias).squeeze(-1)

    def constant(self, score: float) -> None:
        """Score every token the same, the last layer's gradients alive."""
        with torch.no_grad():
            self.weight.zero_()
            self.score_bias.fill_(score)

    def flops(self, tokens: float) -> float:
        return 2 * tokens * (self.hidden_weight.numel() + self.weight.numel())
