"""Guidance: a router learns where the loss still pulls.

    y_i = 1 if ||dL / d(x_i + delta_i)|| is among the largest `capacity` of the call, else 0
    auxiliary loss = BCE(score_i, y_i)

A router that learns through the weight of the updates it lets through never hears of the tokens that it skips, and
settles on whatever it kept first (on Reset-S3: on fillers). The gradient of the loss at a block's output exists for
every token, kept or not: it is large where the output is still wrong, and vanishes where nothing is left to do. So it
says which tokens need a block before the block has learned anything, and without noise or a warm-up. The norm is used,
not its product with the update, because a skipped token has no update.
Ours; related in spirit to gradient-based importance (arXiv 1611.06440), there for pruning.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Guided(torch.autograd.Function):
    """Passes the update on; its second output is a loss of value 0 whose gradient is the cross-entropy's.

    The target is known in backward only. That the loss is an output makes its gradient arrive with whatever the caller
    scaled it by: its coefficient, gradient accumulation, a gradient scaler.
    """

    @staticmethod
    def forward(
        ctx: Any, delta_BTD: Tensor, score_BT: Tensor, reached_BT: Tensor, capacity: float
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(score_BT, reached_BT)
        ctx.capacity = capacity
        return delta_BTD.view_as(delta_BTD), torch.zeros_like(score_BT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None, None]:  # type: ignore[override]
        pulled_BTD, scale_BT = gradients
        score_BT, reached_BT = ctx.saved_tensors
        pull_BT = torch.linalg.vector_norm(pulled_BTD, dim=-1, dtype=score_BT.dtype)
        line = torch.where(reached_BT, pull_BT, torch.nan).nanquantile(1 - ctx.capacity)
        return pulled_BTD, scale_BT * (score_BT.sigmoid() - (pull_BT > line).to(score_BT.dtype)), None, None


def guided(delta_BTD: Tensor, score_BT: Tensor, reached_BT: Tensor, capacity: float) -> tuple[Tensor, Tensor]:
    """The update [B, T, D], and an auxiliary loss [B, T] of value 0 that trains the score in backward.

    score_BT: fp32, whose graph should not reach the model (a detached router input), or the guidance bends the model.
    """
    return _Guided.apply(delta_BTD, score_BT, reached_BT, capacity)  # type: ignore[no-any-return]
