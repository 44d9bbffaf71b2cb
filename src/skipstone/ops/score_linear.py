"""`reference.score_linear`, a router's fp32 product, saving the input unconverted for the backward pass.

The plain form in `reference` saves an fp32 copy of a bf16 input, or the normalised input: one or two times the size of
the stream, which dominates the memory of a routed block that computes an eighth of the tokens. With n = |x| / sqrt(D),
the root mean square:

    y = W x / n        dW = sum (dy / n) x        dx = W^T dy / n - x (dy . y) / (D n^2)

Shape letters: D width, O outputs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipstone.ops import reference


def score_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: bool = False) -> Tensor:
    """Return a router's product x weight^T + bias in fp32, [..., O], saving no fp32 copy of x for the backward pass.

    x: [..., D] of any float dtype, D inputs. weight: [O, D], O outputs. bias: [O] or None. norm: whether x is first
    divided by its root mean square. The result can be differentiated once.
    """
    if not torch.is_grad_enabled() or not (norm or x.dtype != torch.float32) or x.dtype == torch.float64:
        return reference.score_linear(x, weight, bias, norm)
    y = _Product.apply(x, weight, norm)
    return y if bias is None else y + reference.wide(bias)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, norm: bool) -> Tensor:
        y = reference.linear_fp32(x, weight)
        inverse = reference.inverse_rms(x) if norm else None
        y = y if inverse is None else y * inverse
        ctx.save_for_backward(x, weight, inverse, y if norm and x.requires_grad else None)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight, inverse, y = ctx.saved_tensors
        flat_ND, scaled_NO = x.flatten(0, -2).float(), (grad if inverse is None else grad * inverse).flatten(0, -2)
        d_x = d_weight = None
        with reference.without_autocast(x.device.type):
            if ctx.needs_input_grad[0]:
                d_ND = scaled_NO @ weight.float()
                if y is not None:
                    along_N1 = (grad * y).sum(-1, keepdim=True).mul_(inverse.square()).flatten(0, -2)
                    d_ND.addcmul_(flat_ND, along_N1, value=-1 / x.shape[-1])
                d_x = d_ND.view(x.shape).to(x.dtype)
            if ctx.needs_input_grad[1]:
                d_weight = (scaled_NO.T @ flat_ND).to(weight.dtype)
        return d_x, d_weight, None
