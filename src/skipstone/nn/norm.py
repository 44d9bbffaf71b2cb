"""Normalisation layers."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.ops import decode_step
from skipstone.ops import reference as ops


class RMSNorm(nn.Module):
    """Root-mean-square norm, x / sqrt(mean(x^2) + eps) * weight, with statistics in fp32 (arXiv 1910.07467)."""

    offset = 0.0  # what is added to the weight

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), 1 - self.offset))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() <= decode_step.MOST_ROWS * len(self.weight) and decode_step.takes(x, self.weight):
            return decode_step.rms_norm(x, self.weight, self.eps)
        if x.dtype == torch.float32 == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = ops.wide(x)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class OffsetRMSNorm(RMSNorm):
    """Root-mean-square norm of Gemma, x / sqrt(mean(x^2) + eps) * (1 + weight), in fp32; the weight starts at 0."""

    offset = 1.0

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + ops.wide(self.weight)
        return F.rms_norm(ops.wide(x), self.weight.shape, scale, self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the weight w to 0, so that the factor 1 + w starts at 1."""
        init.zeros_(self.weight)


def layernorm_without_bias(width: int, eps: float) -> nn.LayerNorm:
    """Return a layer norm that has a weight and no bias."""
    return nn.LayerNorm(width, eps, bias=False)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rmsnorm": RMSNorm,
    "rmsnorm_offset": OffsetRMSNorm,
    "layernorm": nn.LayerNorm,
    "layernorm_without_bias": layernorm_without_bias,
}
