"""Cross-entropy of the head's logits without the logits: `linear_cross_entropy`, and its plain form as specification.

The chunked form makes the logits of some tokens at a time and, while it has them, the gradients too:

    d logits = softmax(logits) - onehot(target)        d x = d logits W        d W = sum over chunks (d logits)^T x

so that backward only scales them. It computes the three products that the plain form computes, and keeps [chunk, V]
where that keeps [N, V] several times over. (torch 2.13 has a function of this kind; we support older ones.)

Shape letters: N tokens of all rows, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100  # target of a token that is not predicted


def plain_linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor) -> Tensor:
    """The specification: nats summed over the tokens with a target, fp32 (), from fp32 of the head's logits."""
    return F.cross_entropy(F.linear(x_ND, weight_VD).float(), target_N, ignore_index=IGNORED, reduction="sum")


def linear_cross_entropy(x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int) -> Tensor:
    """The same sum, its gradients computed `chunk` tokens at a time; what chunks add up to is fp32.

    target_N: int64, -100 for tokens not to predict. Can be differentiated once, and only once: gradients are handed
    out, not copied, and a second backward raises RuntimeError. Raises ValueError for a chunk below 1.
    """
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    grad = torch.is_grad_enabled()
    wanted = (grad and x_ND.requires_grad, grad and weight_VD.requires_grad)
    return _Loss.apply(x_ND, weight_VD, target_N, chunk, wanted)  # type: ignore[no-any-return]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int, wanted: tuple[bool, bool]
    ) -> Tensor:
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        with torch.autocast(device, enabled=False):
            total, d_x, d_weight = _forward(x_ND.to(dtype), weight_VD.to(dtype), target_N, chunk, wanted)
        ctx.gradients = (
            None if d_x is None else d_x.to(x_ND.dtype),
            None if d_weight is None else d_weight.to(weight_VD.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated already; pass loss_chunk=0 to differentiate it again")
        gradients, ctx.gradients = ctx.gradients, None  # no reference stays, so that they are taken and not copied
        return *(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None, None, None


def _forward(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int, wanted: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The sum, and the gradients that are wanted: of x in x's type, of the weight in fp32."""
    total = torch.zeros((), device=x_ND.device)
    d_x_ND = torch.empty_like(x_ND) if wanted[0] else None
    d_weight_VD = torch.zeros_like(weight_VD, dtype=torch.float32) if wanted[1] else None
    for start in range(0, len(x_ND), chunk):
        at = slice(start, start + chunk)
        nats, d_logits_CV = _chunk(F.linear(x_ND[at], weight_VD).float(), target_N[at])
        total += nats
        d_logits_CV = d_logits_CV.to(x_ND.dtype)
        if d_x_ND is not None:
            torch.mm(d_logits_CV, weight_VD, out=d_x_ND[at])
        if d_weight_VD is not None:
            _add_product(d_weight_VD, d_logits_CV.T, x_ND[at])
    return total, d_x_ND, d_weight_VD


def _chunk(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """The chunk's sum and the gradient of its logits, which takes their place."""
    real_C = target_C != IGNORED
    token_C, at_C = torch.arange(len(target_C), device=target_C.device), torch.where(real_C, target_C, 0)
    largest_C1 = logits_CV.amax(1, keepdim=True)
    picked_C1 = logits_CV.gather(1, at_C[:, None]) - largest_C1
    sum_C1 = logits_CV.sub_(largest_C1).exp_().sum(1, keepdim=True)
    nats_C = torch.where(real_C, (sum_C1.log() - picked_C1)[:, 0], 0.0)
    d_logits_CV = logits_CV.mul_(real_C[:, None] / sum_C1)
    d_logits_CV.index_put_((token_C, at_C), -real_C.float(), accumulate=True)
    return nats_C.sum(), d_logits_CV


def _add_product(sum_VD: Tensor, a_VC: Tensor, b_CD: Tensor) -> None:
    """sum += a b, in place; in fp32 without a second [V, D]."""
    if a_VC.dtype == torch.float32:
        torch.addmm(sum_VD, a_VC, b_CD, out=sum_VD)
    else:
        sum_VD.add_(a_VC @ b_CD)
