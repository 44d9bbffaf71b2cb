"""Normalisation."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipstone.ops import reference as ops


class RMSNorm(nn.Module):
    """Root-mean-square norm, x / sqrt(mean(x^2) + eps) * weight, with statistics in fp32 (arXiv 1910.07467)."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32 == self.weight.dtype:
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = ops.wide(x)
        normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


NORMS: dict[str, Callable[[int, float], nn.Module]] = {"rmsnorm": RMSNorm, "layernorm": nn.LayerNorm}
