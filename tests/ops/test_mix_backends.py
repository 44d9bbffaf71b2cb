"""The chunked mixture of activations equals the reference in values and every gradient."""

from __future__ import annotations

import pytest
import torch

from skipstone.ops import compile_friendly, cpu, reference

SHAPES = [(1, 1), (1, 7), (3, 1), (3, 7)]  # rows of the static part, tokens of the dynamic part


@pytest.mark.parametrize("temperature", [1.0, 0.1])
@pytest.mark.parametrize(("static_rows", "dynamic_tokens"), SHAPES)
@pytest.mark.parametrize("chunk", [1, 64, 1 << 16])
def test_equals_reference(
    static_rows: int, dynamic_tokens: int, temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", chunk)
    gate, static, dynamic = (
        torch.randn(3, 7, 13),
        torch.randn(static_rows, 13, 4),
        3 * torch.randn(3, dynamic_tokens, 4),
    )
    weight = torch.randn(3, 7, 13)
    results = []
    for backend in (reference, cpu, compile_friendly):
        inputs = [x.clone().requires_grad_() for x in (gate, static, dynamic)]
        y = backend.mix_activations(*inputs, temperature)
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for other in results[1:]:
        for wanted, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("apart", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("size", [1.0, 10.0, 30.0, 300.0])
@pytest.mark.parametrize(("rows", "chunk"), [(1, 1 << 15), (1, 22), (2, 22)])
def test_parts_that_want_opposites(
    rows: int, chunk: int, size: float, apart: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of exponentials that vanish one by one, or all of them: every gradient as from the sums.

    apart: how far tokens differ, by how far neurons do; where it is little, what they agree on goes to the neurons.
    """
    monkeypatch.setattr(cpu, "CHUNK_ELEMENTS", chunk)
    gate, weight, results = torch.randn(2, 9, 11), torch.randn(2, 9, 11), []
    static = size * torch.randn(rows, 11, 4)
    dynamic = size * (torch.randn(2, 1, 4) + apart * torch.randn(2, 9, 4))
    for backend in (reference, cpu, compile_friendly):
        inputs = [x.clone().requires_grad_() for x in (gate, static, dynamic)]
        y = backend.mix_activations(*inputs, 1.0)
        results.append((y, *torch.autograd.grad((y * weight).sum(), inputs)))
    for other in results[1:]:
        for wanted, got in zip(results[0], other, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_is_the_rounded_result() -> None:
    gate, static, dynamic = torch.randn(2, 9, 11), torch.randn(2, 11, 4), torch.randn(2, 9, 4)
    expected = reference.mix_activations(gate.bfloat16().float(), static, dynamic, 0.5)
    for backend in (cpu, compile_friendly):
        y = backend.mix_activations(gate.bfloat16(), static, dynamic, 0.5)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, expected.bfloat16()) or (y.float() - expected).abs().max() < 0.02


def test_extreme_logits_stay_finite() -> None:
    """Static and dynamic parts that disagree by far more than an exponential holds."""
    static = torch.tensor([[[0.0, -60.0, -60.0, -60.0]]]).requires_grad_()
    dynamic = torch.tensor([[[-40.0, 0.0, -90.0, -90.0]]])
    gate = torch.tensor([[[1.5]]])
    y = cpu.mix_activations(gate, static, dynamic, 0.1)
    torch.testing.assert_close(y, torch.tensor([[[1.5]]]))
    y.sum().backward()
    assert static.grad is not None
    assert static.grad.isfinite().all()


def test_no_tokens() -> None:
    y = cpu.mix_activations(torch.empty(2, 0, 5), torch.zeros(1, 5, 4), torch.zeros(2, 0, 4), 1.0)
    assert y.shape == (2, 0, 5)
