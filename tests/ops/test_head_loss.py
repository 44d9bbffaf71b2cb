"""The chunked loss equals the plain one, in value and every gradient, and never holds the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from skipstone.adapt.distillation import logit_divergence
from skipstone.ops.head_loss import (
    IGNORED,
    Distillation,
    linear_cross_entropy,
    linear_distillation_loss,
    plain_linear_cross_entropy,
)

N, D, V = 13, 8, 37


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    target_N = torch.randint(V, (N,))
    target_N[[0, 5, 12]] = IGNORED
    return torch.randn(N, D).to(dtype), torch.randn(V, D).to(dtype), target_N


def both(chunk: int, dtype: torch.dtype = torch.float32, context: AbstractContextManager[Any] | None = None) -> Any:
    """(loss, gradient of x, gradient of the weight) of the plain and of the chunked form, scaled by 0.3."""
    x_ND, weight_VD, target_N = inputs(dtype)
    found = []
    forms: list[Callable[[Tensor, Tensor], Tensor]] = [
        lambda x, w: plain_linear_cross_entropy(x, w, target_N),
        lambda x, w: linear_cross_entropy(x, w, target_N, chunk),
    ]
    for form in forms:
        x, w = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        with context or nullcontext():
            loss = form(x, w)
        found.append((loss, *torch.autograd.grad(0.3 * loss, (x, w))))
    return found


@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
def test_equals_the_plain_form(chunk: int) -> None:
    plain, chunked = both(chunk)
    for wanted, got in zip(plain, chunked, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("chunk", [4, 13])
def test_bfloat16_within_its_rounding(chunk: int, autocast: bool) -> None:
    """bf16 has 8 bits: gradients of size g differ by a few g / 256. The types are those of the plain form."""
    context = torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext()
    plain, chunked = both(chunk, torch.float32 if autocast else torch.bfloat16, context)
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-6, atol=1e-6)
    for wanted, got in zip(plain[1:], chunked[1:], strict=True):
        torch.testing.assert_close(got, wanted, rtol=2e-2, atol=2e-2)


def test_large_logits_stay_finite() -> None:
    x_ND, weight_VD, target_N = inputs()
    x_ND = (1e3 * x_ND).requires_grad_()
    loss = linear_cross_entropy(x_ND, weight_VD, target_N, 4)
    torch.testing.assert_close(loss, plain_linear_cross_entropy(x_ND, weight_VD, target_N))
    loss.backward()
    assert x_ND.grad is not None
    assert x_ND.grad.isfinite().all()


def test_tokens_without_a_target_get_no_gradient() -> None:
    x_ND, weight_VD, _ = inputs()
    x_ND.requires_grad_()
    loss = linear_cross_entropy(x_ND, weight_VD, torch.full((N,), IGNORED), 4)
    loss.backward()
    assert loss == 0
    assert x_ND.grad is not None
    assert not x_ND.grad.any()


def test_only_the_gradients_that_are_wanted() -> None:
    x_ND, weight_VD, target_N = inputs()
    x_ND.requires_grad_()
    linear_cross_entropy(x_ND, weight_VD, target_N, 4).backward()
    assert weight_VD.grad is None
    assert x_ND.grad is not None
    with torch.no_grad():
        assert not linear_cross_entropy(x_ND, weight_VD.requires_grad_(), target_N, 4).requires_grad


def test_no_tokens() -> None:
    assert linear_cross_entropy(torch.empty(0, D), torch.randn(V, D), torch.empty(0, dtype=torch.long), 4) == 0


def test_a_second_backward_is_refused() -> None:
    x_ND, weight_VD, target_N = inputs()
    loss = linear_cross_entropy(x_ND.requires_grad_(), weight_VD, target_N, 4)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="loss_chunk=0"):
        loss.backward()


def test_a_chunk_of_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1 token, got 0"):
        linear_cross_entropy(*inputs(), 0)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor with an axis of the vocabulary that is not the weight's or its gradient's."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and V in out.shape and D not in out.shape:
            self.elements = max(self.elements, out.numel())
        return out


def test_the_logits_of_all_tokens_never_exist() -> None:
    x_ND, weight_VD, target_N = inputs()
    with _Largest() as largest:
        linear_cross_entropy(x_ND.requires_grad_(), weight_VD.requires_grad_(), target_N, 4).backward()
    assert largest.elements == 4 * V
    with _Largest() as largest:
        plain_linear_cross_entropy(x_ND, weight_VD, target_N).backward()
    assert largest.elements == N * V


def teacher(dtype: torch.dtype = torch.float32, temperature: float = 1.0) -> Distillation:
    """Of another width than the student."""
    hidden_BTE, head_VE = torch.randn(1, N, 5).to(dtype), torch.randn(V, 5).to(dtype)
    return Distillation(
        hidden_BTE=hidden_BTE, head_VE=head_VE, language_modelling=0.3, distillation=0.9, temperature=temperature
    )


def plain_taught(
    x_ND: Tensor, weight_VD: Tensor, target_N: Tensor, distillation: Distillation
) -> tuple[Tensor, Tensor, Tensor]:
    """From all logits of both."""
    nats = plain_linear_cross_entropy(x_ND, weight_VD, target_N)
    theirs = distillation.hidden_BTE[0] @ distillation.head_VE.T
    far = logit_divergence(x_ND @ weight_VD.T, theirs, target_N != IGNORED, distillation.temperature)
    return distillation.language_modelling * nats + distillation.distillation * far, nats, far


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("chunk", [1, 4, 13, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_teacher_in_chunks_is_a_teacher(chunk: int, temperature: float, dtype: torch.dtype) -> None:
    x_ND, weight_VD, target_N = inputs(dtype)
    distillation, found = teacher(dtype, temperature), []
    for form in (plain_taught, lambda *given: linear_distillation_loss(*given, chunk)):
        x, w = x_ND.clone().requires_grad_(), weight_VD.clone().requires_grad_()
        losses = form(x, w, target_N, distillation)
        found.append((*losses, *torch.autograd.grad(0.3 * losses[0], (x, w))))
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    for wanted, got in zip(*found, strict=True):
        assert wanted.dtype == got.dtype
        torch.testing.assert_close(got, wanted, rtol=tolerance, atol=tolerance)


def test_only_what_is_minimised_has_a_gradient() -> None:
    x_ND, weight_VD, target_N = inputs()
    total, *parts = linear_distillation_loss(x_ND.requires_grad_(), weight_VD, target_N, teacher(), 4)
    assert total.requires_grad
    assert not any(part.requires_grad for part in parts)


def test_a_teachers_logits_never_exist_at_once() -> None:
    x_ND, weight_VD, target_N = inputs()
    with _Largest() as largest:
        linear_distillation_loss(x_ND.requires_grad_(), weight_VD.requires_grad_(), target_N, teacher(), 4)[
            0
        ].backward()
    assert largest.elements == 5 * V  # the teacher's head [V, 5] itself; chunks are of 4
