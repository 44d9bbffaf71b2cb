"""The Triton kernels equal the reference in values and every gradient.

`test_fused.py` runs this file in a process of its own: without a GPU the kernels are interpreted, which Triton has to
know when it is imported.
"""

from __future__ import annotations

import pytest
import torch

from skipstone import ops
from skipstone.ops import cpu, fused, reference

SHAPES = [(1, 1), (1, 37), (3, 1), (3, 37)]  # rows of the static part, tokens of the dynamic part


@pytest.fixture
def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(("static_rows", "dynamic_tokens"), SHAPES)
def test_equals_reference(device: str, static_rows: int, dynamic_tokens: int, temperature: float) -> None:
    parts = (torch.randn(3, 37, 70), torch.randn(static_rows, 70, 4), 3 * torch.randn(3, dynamic_tokens, 4))
    weight, results = torch.randn(3, 37, 70), []
    for backend in (reference, fused):
        inputs = [x.to(device).requires_grad_() for x in parts]
        y = backend.mix_activations(*inputs, temperature)
        results.append((y, *torch.autograd.grad((y * weight.to(device)).sum(), inputs)))
    for wanted, got in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=3e-5, atol=3e-5)


def test_bfloat16_is_the_rounded_result(device: str) -> None:
    gate, static, dynamic = (x.to(device) for x in (torch.randn(2, 9, 11), torch.randn(2, 11, 4), torch.randn(2, 9, 4)))
    gate = gate.bfloat16().requires_grad_()
    expected = reference.mix_activations(gate.float(), static, dynamic, 0.5)
    y = fused.mix_activations(gate, static, dynamic, 0.5)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=2**-8, atol=2**-8)
    assert torch.autograd.grad(y.sum(), gate)[0].dtype == torch.bfloat16


def test_no_tokens(device: str) -> None:
    y = fused.mix_activations(*(torch.zeros(size, device=device) for size in ((2, 0, 5), (1, 5, 4), (2, 0, 4))), 1.0)
    assert y.shape == (2, 0, 5)


def test_cuda_takes_it() -> None:
    assert ops._eager("cuda") is fused
    assert ops._eager("cpu") is cpu
    assert ops._eager("mps") is reference
