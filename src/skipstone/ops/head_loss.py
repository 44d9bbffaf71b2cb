"""Cross-entropy of the output head without storing all logits: `linear_cross_entropy`, and its plain form.

The chunked form computes the logits of some tokens at a time, and their gradients at once:

    d logits = softmax(logits) - onehot(target)        d x = d logits W        d W = sum over chunks (d logits)^T x

so that the backward pass only scales them. It computes the same three matrix products as the plain form, but holds one
tensor [chunk, V] instead of several tensors [N, V]. (From version 2.13 on, torch has
`torch.nn.functional.linear_cross_entropy`, which does the same.)

`linear_distillation_loss` adds a distillation loss computed in the same chunks, at temperature T:

    T^2 KL(teacher || student)        d logits = T (softmax(logits / T) - softmax(teacher's logits / T))

With a soft cap c the logits are c tanh(x W^T / c), and d (x W^T) = d logits (1 - tanh^2).

Shape letters: B rows, T tokens, N tokens of all rows, D width, E width of the teacher, V vocabulary, C tokens of a
chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from skipstone.ops.reference import add_matmul, wide, wide_dtype

IGNORED = -100  # target of a token that is not predicted


def plain_linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, soft_cap: float | None = None
) -> Tensor:
    """Return the cross-entropy of a linear output head, summed over tokens, in nats, fp32 [], from all logits at once.

    It is the plain form against which faster ones are tested. x_ND: hidden states of N tokens. weight_VD: the head's
    weight, for V tokens of the vocabulary. target_N: int64, -100 for tokens without a target. soft_cap: c, if logits
    become c tanh(logits / c); None means no cap.
    """
    logits_NV = wide(F.linear(x_ND, weight_VD))
    if soft_cap is not None:
        logits_NV = (logits_NV / soft_cap).tanh() * soft_cap
    return F.cross_entropy(logits_NV, target_N, ignore_index=IGNORED, reduction="sum")


@dataclass(frozen=True, kw_only=True)
class Distillation:
    """A teacher's outputs for the same tokens as the student's, and the coefficients of the two parts of the loss.

    hidden_BTE: the input of the teacher's output head, [B, T, E] for rows, tokens and width. head_VE: the head's weight
    [V, E]. Neither gets a gradient. language_modelling: coefficient of the cross-entropy. distillation: coefficient of
    T^2 KL(teacher || student), in nats. temperature: T (Hinton et al. 2015, arXiv 1503.02531). soft_cap: c, if the
    teacher's logits become c tanh(logits / c); None means no cap.
    """

    hidden_BTE: Tensor
    head_VE: Tensor
    language_modelling: float
    distillation: float
    temperature: float = 1.0
    soft_cap: float | None = None


def linear_cross_entropy(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, chunk: int, soft_cap: float | None = None
) -> Tensor:
    """Return the summed cross-entropy of a linear output head, in nats, fp32 [], without storing all logits.

    x_ND: hidden states of N tokens. weight_VD: the head's weight, for V tokens of the vocabulary. target_N: int64, -100
    for tokens without a target. chunk: number of tokens whose logits are computed at a time. soft_cap: c, if logits
    become c tanh(logits / c); None means no cap. Gradients are computed in the forward pass, so the result can be
    differentiated once only: a second backward pass raises RuntimeError. Raises ValueError for a chunk below 1.
    """
    return _loss(x_ND, weight_VD, target_N, None, chunk, soft_cap)[0]


def linear_distillation_loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    distillation: Distillation,
    chunk: int,
    soft_cap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return total loss, cross-entropy and T^2 KL(teacher || student), each summed over tokens with a target, fp32 [].

    x_ND: hidden states of N tokens. weight_VD: the student's head. target_N: int64, -100 for tokens without a target.
    distillation: the teacher's outputs, temperature T and the coefficients of cross-entropy and divergence in the
    total. chunk: number of tokens whose logits are computed at a time. soft_cap: c, if the student's logits become c
    tanh(logits / c); None means no cap. Only the total can be differentiated, and only once. Raises ValueError for a
    chunk below 1.
    """
    return _loss(x_ND, weight_VD, target_N, distillation, chunk, soft_cap)


def _loss(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    distillation: Distillation | None,
    chunk: int,
    soft_cap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    if chunk < 1:
        raise ValueError(f"chunk must be at least 1 token, got {chunk}")
    grad = torch.is_grad_enabled()
    wanted = (grad and x_ND.requires_grad, grad and weight_VD.requires_grad)
    return _Loss.apply(x_ND, weight_VD, target_N, distillation, (chunk, soft_cap), wanted)  # type: ignore[no-any-return]


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_ND: Tensor,
        weight_VD: Tensor,
        target_N: Tensor,
        distillation: Distillation | None,
        how: tuple[int, float | None],
        wanted: tuple[bool, bool],
    ) -> tuple[Tensor, Tensor, Tensor]:
        device = x_ND.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_VD.dtype
        with torch.autocast(device, enabled=False):
            teacher = None if distillation is None else _Teacher(distillation, dtype)
            found, d_x, d_weight = _forward(x_ND.to(dtype), weight_VD.to(dtype), target_N, teacher, how, wanted)
        ctx.gradients = (
            None if d_x is None else d_x.to(x_ND.dtype),
            None if d_weight is None else d_weight.to(weight_VD.dtype),
        )
        nats, divergence = found
        total = (
            nats.clone()
            if distillation is None
            else distillation.language_modelling * nats + distillation.distillation * divergence
        )
        ctx.mark_non_differentiable(nats, divergence)
        return total, nats, divergence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("this loss was differentiated already; pass loss_chunk=0 to differentiate it again")
        gradients, ctx.gradients = ctx.gradients, None  # drop the reference, so that autograd takes them without a copy
        return *(None if gradient is None else gradient.mul_(grad) for gradient in gradients), None, None, None, None


class _Teacher:
    """The teacher's hidden states and head, in the dtype of the products."""

    def __init__(self, distillation: Distillation, dtype: torch.dtype) -> None:
        self.distillation = distillation
        self.x_NE, self.weight_VE = distillation.hidden_BTE.flatten(0, 1).to(dtype), distillation.head_VE.to(dtype)

    def log_odds(self, at: slice) -> Tensor:
        """Return the teacher's log-probabilities at the temperature for the tokens of the range `at`, fp32 [C, V]."""
        logits_CV = _capped(wide(F.linear(self.x_NE[at], self.weight_VE)), self.distillation.soft_cap)[0]
        return F.log_softmax(logits_CV.div_(self.distillation.temperature), dim=-1)


def _forward(
    x_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    teacher: _Teacher | None,
    how: tuple[int, float | None],
    wanted: tuple[bool, bool],
) -> tuple[tuple[Tensor, Tensor], Tensor | None, Tensor | None]:
    """Return cross-entropy and T^2 KL, summed over tokens, and the gradients of their weighted sum, chunk by chunk.

    x_ND, weight_VD, target_N: as in `linear_cross_entropy`. teacher: with None, the second sum is 0 and the gradients
    are those of the cross-entropy. how: tokens of a chunk, and the soft cap or None. wanted: whether the gradients of x
    and of the weight are needed; those that are not are None. The gradient of x has its dtype, that of the weight is
    fp32.
    """
    nats, divergence = torch.zeros((), device=x_ND.device), torch.zeros((), device=x_ND.device)
    d_x_ND = torch.empty_like(x_ND) if wanted[0] else None
    d_weight_VD = torch.zeros_like(weight_VD, dtype=wide_dtype(weight_VD)) if wanted[1] else None
    chunk, soft_cap = how
    for start in range(0, len(x_ND), chunk):
        at = slice(start, start + chunk)
        logits_CV, slope_CV = _capped(wide(F.linear(x_ND[at], weight_VD)), soft_cap)
        if teacher is None:
            more, d_logits_CV = _chunk(logits_CV, target_N[at])
        else:
            far, pulled_CV = _distillation_chunk(
                logits_CV, target_N[at], teacher.log_odds(at), teacher.distillation.temperature
            )
            more, d_logits_CV = _chunk(logits_CV, target_N[at])
            d_logits_CV.mul_(teacher.distillation.language_modelling).add_(
                pulled_CV, alpha=teacher.distillation.distillation
            )
            divergence += far
        nats += more
        if slope_CV is not None:
            d_logits_CV.mul_(slope_CV)
        d_logits_CV = d_logits_CV.to(x_ND.dtype)
        if d_x_ND is not None:
            torch.mm(d_logits_CV, weight_VD, out=d_x_ND[at])
        if d_weight_VD is not None:
            add_matmul(d_weight_VD, d_logits_CV.T, x_ND[at])
    return (nats, divergence), d_x_ND, d_weight_VD


def _capped(logits_CV: Tensor, soft_cap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the logits after a soft cap, c tanh(logits / c), and the cap's derivative at each of them, [C, V] each.

    logits_CV: overwritten. soft_cap: c; with None, the logits are returned as they are, and None for the derivative.
    """
    if soft_cap is None:
        return logits_CV, None
    share_CV = logits_CV.div_(soft_cap).tanh_()
    slope_CV = 1 - share_CV.square()
    return share_CV.mul_(soft_cap), slope_CV


def _chunk(logits_CV: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy in nats, summed over a chunk's tokens, and its gradient with respect to the logits.

    logits_CV: fp32; the gradient is written in their place. target_C: int64, -100 for tokens without a target.
    """
    real_C = target_C != IGNORED
    token_C, at_C = torch.arange(len(target_C), device=target_C.device), torch.where(real_C, target_C, 0)
    largest_C1 = logits_CV.amax(1, keepdim=True)
    picked_C1 = logits_CV.gather(1, at_C[:, None]) - largest_C1
    sum_C1 = logits_CV.sub_(largest_C1).exp_().sum(1, keepdim=True)
    nats_C = torch.where(real_C, (sum_C1.log() - picked_C1)[:, 0], 0.0)
    d_logits_CV = logits_CV.mul_(real_C[:, None] / sum_C1)
    d_logits_CV.index_put_((token_C, at_C), -real_C.to(d_logits_CV.dtype), accumulate=True)
    return nats_C.sum(), d_logits_CV


def _distillation_chunk(
    logits_CV: Tensor, target_C: Tensor, teacher_CV: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return T^2 KL(teacher || student) in nats, summed over a chunk, and its gradient with respect to the logits.

    logits_CV: the student's logits, left unchanged. target_C: int64, -100 for tokens that do not count. teacher_CV: the
    teacher's log-probabilities at the temperature, overwritten. temperature: T.
    """
    real_C1 = (target_C != IGNORED)[:, None]
    ours_CV = F.log_softmax(logits_CV / temperature, dim=-1)
    odds_CV = teacher_CV.exp()
    far_C = (teacher_CV.sub_(ours_CV)).mul_(odds_CV).sum(1)
    far_C = torch.where(real_C1[:, 0], far_C, 0.0) * temperature**2
    return far_C.sum(), ours_CV.exp_().sub_(odds_CV).mul_(real_C1 * temperature)
