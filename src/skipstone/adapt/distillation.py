"""Distillation losses: divergence from the dense model's logits, and error of the hidden states after each block.

Shape letters: B rows, T tokens, V vocabulary, D width.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def logit_divergence(student_BTV: Tensor, teacher_BTV: Tensor, asked_BT: Tensor, temperature: float) -> Tensor:
    """Return T^2 KL(teacher || student) at temperature T in nats, summed over predicted tokens: fp32 [].

    student_BTV, teacher_BTV: logits [B, T, V] over the V tokens of the vocabulary. asked_BT: bool [B, T], the positions
    that have a target. temperature: T; the factor T^2 keeps the size of the gradient independent of it (Hinton et al.
    2015, arXiv 1503.02531).
    """
    ours_BTV, theirs_BTV = (F.log_softmax(x.float() / temperature, dim=-1) for x in (student_BTV, teacher_BTV))
    each_BT = F.kl_div(ours_BTV, theirs_BTV, log_target=True, reduction="none").sum(-1)
    return torch.where(asked_BT, each_BT, 0.0).sum() * temperature**2


def stream_error(student: Sequence[Tensor], teacher: Sequence[Tensor], asked_BT: Tensor) -> Tensor:
    """Return the squared error of the student's hidden states, divided by the teacher's mean square, fp32 [].

    The error of a token is the mean over D; the result is summed over tokens and averaged over blocks. student,
    teacher: the hidden states [B, T, D] after each block, in order. asked_BT: bool [B, T], the tokens to compare.
    """
    total = torch.zeros((), device=asked_BT.device)
    for ours_BTD, theirs_BTD in zip(student, teacher, strict=True):
        error_BT = (ours_BTD.float() - theirs_BTD.float()).square().mean(-1)
        scale = theirs_BTD.float().square().mean(-1)[asked_BT].mean().clamp(min=torch.finfo(torch.float32).tiny)
        total = total + torch.where(asked_BT, error_BT, 0.0).sum() / scale
    return total / len(student)
