"""Normalisation layers: root-mean-square norms, layer norms, and a norm for each attention head."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.ops import decode_step
from skipstone.ops import reference as ops


class RMSNorm(nn.Module):
    """Root-mean-square norm, x / sqrt(mean(x^2) + eps) * weight, with statistics in fp32 (arXiv 1910.07467).

    width: number of features, the last axis of x. eps: added to the mean square. The weight starts at 1.
    """

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
    """Gemma's root-mean-square norm, x / sqrt(mean(x^2) + eps) * (1 + weight), in fp32; the weight starts at 0.

    width: number of features, the last axis of x. eps: added to the mean square.
    """

    offset = 1.0

    def forward(self, x: Tensor) -> Tensor:
        scale = 1.0 + ops.wide(self.weight)
        return F.rms_norm(ops.wide(x), self.weight.shape, scale, self.eps).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the weight to 0, so that the factor 1 + weight is 1."""
        init.zeros_(self.weight)


class OffsetLayerNorm(nn.LayerNorm):
    """Nemotron's LayerNorm, which multiplies by 1 + weight; the weight is initialised to 0."""

    offset = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.normalized_shape, self.weight + 1.0, self.bias, self.eps)

    def reset_parameters(self) -> None:
        """Set the weight to 0, so that the factor 1 + weight is 1, and the bias to 0."""
        init.zeros_(self.weight)
        init.zeros_(self.bias)


class HeadNorm(nn.Module):
    """A norm over the features of each attention head, with separate weights for each head (as in Command R+).

    It normalises the last axis of x [..., H, E] (heads, features) in fp32. like: a norm of one head, RMSNorm or
    LayerNorm, from which the kind, eps, initial weight and use of a bias are copied. heads: number of heads H.
    """

    def __init__(self, like: nn.Module, heads: int) -> None:
        super().__init__()
        assert isinstance(like, RMSNorm | nn.LayerNorm)
        self.eps, self.centred = like.eps, isinstance(like, nn.LayerNorm)
        self.offset = getattr(like, "offset", 0.0)
        self.weight = nn.Parameter(torch.full((heads, *like.weight.shape), 1 - self.offset))
        biased = isinstance(like, nn.LayerNorm) and like.bias is not None
        self.bias = nn.Parameter(torch.zeros_like(self.weight)) if biased else None

    def forward(self, x: Tensor) -> Tensor:
        wide, width = ops.wide(x), x.shape[-1:]
        normed = F.layer_norm(wide, width, eps=self.eps) if self.centred else F.rms_norm(wide, width, eps=self.eps)
        scaled = normed * (self.offset + ops.wide(self.weight))
        return (scaled if self.bias is None else scaled + ops.wide(self.bias)).to(x.dtype)

    def reset_parameters(self) -> None:
        """Set the factor on every feature, which is offset + weight, to 1, and the bias to 0."""
        init.constant_(self.weight, 1 - self.offset)
        if self.bias is not None:
            init.zeros_(self.bias)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


def layernorm_without_bias(width: int, eps: float) -> nn.LayerNorm:
    """Return a LayerNorm over `width` features with a weight and no bias. eps: added to the variance."""
    return nn.LayerNorm(width, eps, bias=False)


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rmsnorm": RMSNorm,
    "rmsnorm_offset": OffsetRMSNorm,
    "layernorm": nn.LayerNorm,
    "layernorm_without_bias": layernorm_without_bias,
    "layernorm_offset": OffsetLayerNorm,
}
