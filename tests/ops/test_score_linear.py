"""The memory-saving product of scores equals the plain one in every gradient."""

from __future__ import annotations

import pytest
import torch

from skipstone import ops
from skipstone.mechanisms.routers import build_router
from skipstone.ops import reference


def plain(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, norm: bool) -> torch.Tensor:
    """As it is written: the normalised input, then the product."""
    return reference.linear_fp32(reference.normalised(x) if norm else x, weight, bias)


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("learns", ["both", "weight", "x"])
@pytest.mark.parametrize("autocast", [True, False])
def test_equals_the_plain_one(norm: bool, dtype: torch.dtype, outputs: int, learns: str, autocast: bool) -> None:
    x_BTD, weight, bias = 3 * torch.randn(2, 5, 7).to(dtype), torch.randn(outputs, 7), torch.randn(outputs)
    pull, results = torch.randn(2, 5, outputs), []
    for product in (plain, ops.score_linear):
        x, w = (t.clone().requires_grad_(learns in ("both", which)) for t, which in ((x_BTD, "x"), (weight, "weight")))
        b = bias.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = product(x, w, b, norm)
        (y * pull).sum().backward()
        assert y.dtype == torch.float32
        results.append([y, *(t.grad for t in (x, w, b) if t.requires_grad)])
    for wanted, got in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        loose = 2e-2 if got.dtype == torch.bfloat16 else 2e-5
        torch.testing.assert_close(got, wanted, rtol=loose, atol=loose)


def test_an_input_of_zeros() -> None:
    x = torch.zeros(1, 2, 4, requires_grad=True)
    ops.score_linear(x, torch.randn(1, 4), None, norm=True).sum().backward()
    assert x.grad is not None
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_nothing_as_large_as_the_stream_is_kept(kind: str, dtype: torch.dtype) -> None:
    x_BTD, router, kept = torch.randn(2, 64, 256).to(dtype), build_router(kind, 256, norm=True), []

    def pack(x: torch.Tensor) -> torch.Tensor:
        kept.append(x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        router(x_BTD)
    streams = {x.data_ptr() for x in kept if x.numel() >= x_BTD.numel()}
    assert streams == {x_BTD.data_ptr()}
