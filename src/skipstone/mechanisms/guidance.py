"""Guidance: a router learns from the gradient of the loss at the block's output which tokens need the block.

    y_i = 1 if ||dL / d(x_i + delta_i)|| is among the largest `capacity` of the call, else 0
    auxiliary loss = BCE(score_i, y_i)

A router that learns only through the weights of kept updates gets no gradient from skipped tokens, and settles on the
tokens that it kept first (on the synthetic corpus Reset-S3, on meaningless fillers). The gradient of the loss at a
block's output exists for every token, kept or not: it is large where the output is still wrong and vanishes where
nothing is left to improve. It thus shows which tokens need a block before the block has learned anything, without noise
or warm-up. Its norm is used, not its product with the update, because skipped tokens have no update. The method is
ours; gradient-based importance for pruning (arXiv 1611.06440) is related.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Guided(torch.autograd.Function):
    """The update unchanged, and a loss of 0 whose gradient is that of binary cross-entropy against gradient norms.

    The target is only known in the backward pass. Because the loss is an output, its gradient arrives with all factors
    that the caller applies: its coefficient, gradient accumulation, a gradient scaler.
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
    """Return the update unchanged, [B, T, D], and a zero-valued loss [B, T] whose gradient trains the router's scores.

    In the backward pass, the `capacity` share of reached tokens with the largest gradient norm at the block's output
    becomes the positive class, and the gradient of binary cross-entropy against it flows into the scores. delta_BTD:
    the update. score_BT: fp32 router scores; compute them from a detached input, or the guidance also changes the
    model. reached_BT: bool, tokens that are neither padding nor skipped by an outer mechanism. capacity: the share of
    reached tokens in the positive class, in (0, 1). The method is ours.
    """
    return _Guided.apply(delta_BTD, score_BT, reached_BT, capacity)  # type: ignore[no-any-return]
