"""Experts by grouped products equal the reference in values and every gradient, whatever unused memory holds."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ops import grouped, reference

SIZES = [(37, 2, 5, 16, 24), (1, 3, 4, 8, 8), (64, 1, 8, 32, 40), (9, 4, 4, 8, 16)]  # tokens, choices, experts, D, F
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def inputs(
    sizes: tuple[int, ...], dtype: torch.dtype, device: str, idle: float | None
) -> tuple[list[Tensor], list[Tensor | None]]:
    """Return the tensors with a gradient (x, weights, matrices), and the choices."""
    N, C, X, D, width = sizes

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape).to(device, dtype).requires_grad_()

    weight_NC = torch.rand(N, C).to(device).requires_grad_()
    expert_NC = torch.rand(N, X).argsort(1)[:, :C].to(device)
    expert_NC = torch.where(expert_NC == 1, (expert_NC + 1) % X, expert_NC) if C == 1 else expert_NC  # one is unused
    idle_NC = None if idle is None else (torch.rand(N, C) < idle).to(device)
    return [random(N, D), weight_NC, *(random(X, width, D) for _ in "gu"), random(X, D, width)], [expert_NC, idle_NC]


def results(backend: object, leaves: list[Tensor], chosen: list[Tensor | None]) -> list[Tensor]:
    x, weight, *matrices = leaves
    junk = [torch.full((1 << 12,), float("nan"), device=x.device) for _ in range(200)]
    del junk  # memory that is handed out again holds NaN
    y = backend.apply_experts(x, chosen[0], weight, chosen[1], *matrices, F.silu)  # type: ignore[attr-defined]
    return [
        y,
        *torch.autograd.grad((y.float() * torch.linspace(-1, 1, y.numel()).view_as(y).to(y.device)).sum(), leaves),
    ]


@pytest.mark.parametrize("idle", [None, 0.0, 0.4, 1.0])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_reference(sizes: tuple[int, ...], dtype: torch.dtype, idle: float | None) -> None:
    check(sizes, dtype, "cpu", idle)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_equals_reference_on_a_gpu(dtype: torch.dtype) -> None:
    for sizes in SIZES:
        check(sizes, dtype, "cuda", None)
        check(sizes, dtype, "cuda", 0.4)


def check(sizes: tuple[int, ...], dtype: torch.dtype, device: str, idle: float | None) -> None:
    leaves, chosen = inputs(sizes, dtype, device, idle)
    expected, got = (results(backend, leaves, chosen) for backend in (reference, grouped))
    for wanted, found in zip(expected, got, strict=True):
        assert found.dtype == wanted.dtype
        scale = wanted.abs().max().item()
        assert (scale > 0) == (idle != 1.0)
        assert (found - wanted).abs().max().item() <= TOLERANCE[dtype] * scale


def test_what_idle_choices_hold_does_not_matter() -> None:
    leaves, (expert, idle) = inputs(SIZES[0], torch.float32, "cpu", 0.5)
    assert idle is not None
    assert expert is not None
    other = torch.where(idle, 99, expert)
    for wanted, found in zip(
        results(grouped, leaves, [expert, idle]), results(grouped, leaves, [other, idle]), strict=True
    ):
        assert torch.equal(found, wanted)


def test_autocast_decides_the_type_of_the_products() -> None:
    leaves, chosen = inputs(SIZES[0], torch.float32, "cpu", None)
    with torch.autocast("cpu", torch.bfloat16):
        got = results(grouped, leaves, chosen)
    assert got[0].dtype == torch.bfloat16
    for gradient, leaf, wanted in zip(got[1:], leaves, results(reference, leaves, chosen)[1:], strict=True):
        assert gradient.dtype == leaf.dtype == torch.float32
        assert (gradient - wanted).norm() < 0.02 * wanted.norm()
