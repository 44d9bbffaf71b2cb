"""A few fp32 tokens times a large matrix, by the kernel, equal the layer, and the layer computes where it must."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from skipstone.measure.flops import count_flops
from skipstone.nn import few_tokens
from skipstone.ops import float16

pytest.importorskip("numba")


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "LARGE", 1)


def tokens(count: int, inputs: int = 64) -> torch.Tensor:
    return torch.randn(1, count, inputs, generator=torch.Generator().manual_seed(count))


@pytest.mark.parametrize("count", [1, 2, 3, 8, 9])
def test_products_are_those_of_the_layer(count: int) -> None:
    layer = nn.Linear(64, 37, bias=False)
    with torch.no_grad():
        torch.testing.assert_close(few_tokens.multiplied(layer, tokens(count)), layer(tokens(count)))


def test_the_kernel_computes_few_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    kernel = float16.few_tokens
    monkeypatch.setattr(float16, "few_tokens", lambda x, w: calls.append(x.shape[1]) or kernel(x, w))
    layer = nn.Linear(64, 37, bias=False)
    with torch.no_grad():
        for count in range(1, 12):
            few_tokens.multiplied(layer, tokens(count))
        assert calls == [2, 3, 4, 5, 6, 7, 8]
        few_tokens.multiplied(nn.Linear(64, 37), tokens(2))  # a bias
        few_tokens.multiplied(nn.Linear(48, 37, bias=False), tokens(2, 48))  # no multiple of 32
        few_tokens.multiplied(layer.to(torch.bfloat16), tokens(2).bfloat16())
        hooked = nn.Linear(64, 37, bias=False)
        hooked.register_forward_hook(lambda module, given, out: out + 1)
        assert few_tokens.multiplied(hooked, tokens(2)).ne(tokens(2) @ hooked.weight.T).all()
    with torch.enable_grad():
        layer = nn.Linear(64, 37, bias=False)
        few_tokens.multiplied(layer, tokens(2)).sum().backward()
        assert layer.weight.grad is not None
    assert len(calls) == 7


def test_without_numba_the_layer_computes_and_nothing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_tokens, "HAS_NUMBA", False)
    monkeypatch.setattr(few_tokens, "in_place", lambda *_: pytest.fail("asked, which warns"))
    layer = nn.Linear(64, 37, bias=False)
    with torch.no_grad():
        assert torch.equal(few_tokens.multiplied(layer, tokens(2)), layer(tokens(2)))


def test_flops_are_counted() -> None:
    layer = nn.Linear(64, 37, bias=False)
    with torch.no_grad():
        assert count_flops(lambda: few_tokens.multiplied(layer, tokens(2))).total == 2 * 2 * 64 * 37


def test_one_graph_is_compiled() -> None:
    layer = nn.Linear(64, 37, bias=False)
    graph = torch.compile(lambda x: few_tokens.multiplied(layer, x), fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(graph(tokens(3)), layer(tokens(3)))
