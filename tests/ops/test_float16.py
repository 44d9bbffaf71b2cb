"""Products with weights in bf16 and fp16: the kernel, and the ordinary product that takes its place."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from skipstone.measure.flops import count_flops
from skipstone.ops import float16, int4, int8

DTYPES = [torch.bfloat16, torch.float16]


def given(dtype: torch.dtype, outputs: int, inputs: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    made = torch.Generator().manual_seed(outputs * inputs + tokens)
    weight = torch.randn(outputs, inputs, generator=made).to(dtype)
    return torch.randn(tokens, inputs, generator=made), weight


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inputs", [32, 96, 576, 1536, 40, 7])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 9])
def test_a_product_is_that_of_the_numbers(dtype: torch.dtype, inputs: int, tokens: int) -> None:
    x, weight = given(dtype, 35, inputs, tokens)
    want = x.double() @ weight.double().t()
    torch.testing.assert_close(float16.linear(x, weight).double(), want, rtol=1e-5, atol=1e-4)
    assert float16.linear(x[None], weight).shape == (1, tokens, 35)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_number_is_widened_exactly(dtype: torch.dtype) -> None:
    """All finite bit patterns, also subnormal ones, against a token that selects one input."""
    bits = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int32).to(torch.int16).view(-1, 32)
    weight = bits.view(dtype)
    weight = torch.where(weight.isfinite(), weight, 0)
    for i in (0, 15, 31):
        x = torch.zeros(1, 32)
        x[0, i] = 1
        assert torch.equal(float16.linear(x, weight)[0], weight[:, i].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_not_finite_stays_so(dtype: torch.dtype) -> None:
    x, weight = given(dtype, 16, 64, 1)
    weight[3, 5], weight[4, 6] = float("inf"), float("nan")
    found = float16.linear(x, weight)[0]
    assert found[3].isinf()
    assert found[4].isnan()
    assert found.isfinite().sum() == 14


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads_share_the_rows(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("numba")
    from skipstone.ops import int8_linear_native

    x, weight = given(dtype, 1027, 128, 3)
    alone = float16.linear(x, weight)
    monkeypatch.setattr(int8_linear_native, "threads", lambda: 3)
    assert torch.equal(float16.linear(x, weight), alone)


def test_a_token_that_needs_gradients_gets_them() -> None:
    x, weight = given(torch.bfloat16, 16, 64, 2)
    x.requires_grad_()
    float16.linear(x, weight).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, weight.float().sum(0).expand(2, -1))


def test_operations_are_counted() -> None:
    x, weight = given(torch.float16, 16, 64, 2)
    counted = count_flops(lambda: float16.linear(x, weight))
    assert (counted.total, not counted.unknown) == (2 * 2 * 64 * 16, True)


@pytest.mark.parametrize(
    ("numbers", "dtype"),
    [
        ([1.0, 3e38, 2.0**-20], torch.bfloat16),
        ([1.0, 1 + 2.0**-10], torch.float16),
        ([1.0, 1 + 2.0**-20], torch.float16),
        ([7e4, 1 + 2.0**-20], torch.bfloat16),
        ([1e30, 1 + 2.0**-20], torch.bfloat16),
        ([2.0**-24 * 1.3, 2.0**-23 * 1.3], torch.bfloat16),
        ([2.0**-12 * (1 + 2.0**-10)], torch.float16),
    ],
)
def test_the_format_that_loses_least(numbers: list[float], dtype: torch.dtype) -> None:
    assert float16.format_of([torch.tensor(numbers), torch.ones(3)]) == dtype


def test_numbers_that_are_not_finite_are_refused() -> None:
    with pytest.raises(ValueError, match="not finite cannot be stored in 16 bits"):
        float16.format_of([torch.tensor([1.0, float("nan")])])


def test_tokens_of_another_width_are_refused() -> None:
    """Kernels would read and write beyond the ends of tensors."""
    for width in (32, 96, 128):
        x = torch.zeros(2, width)
        for multiply in (
            lambda x: float16.linear(x, torch.zeros(8, 64, dtype=torch.float16)),
            lambda x: int8.linear(x, torch.zeros(8, 64, dtype=torch.int8), torch.ones(8)),
            lambda x: int4.linear(x, torch.zeros(8, 40, dtype=torch.uint8)),
        ):
            with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
                multiply(x)


WIDENED = """
import numpy as np
from numba import njit
from skipstone.ops.int4_dot import widen

source = np.arange(1 << 16, dtype=np.uint16)
target = np.empty(1 << 16, np.float32)
convert = njit(lambda source, target, count: widen(source, target, count))
convert(source.ctypes.data, target.ctypes.data, len(source))
want = source.view(np.float16).astype(np.float32)
assert np.array_equal(target[~np.isnan(want)].view(np.int32), want[~np.isnan(want)].view(np.int32))
assert np.isnan(target[np.isnan(want)]).all()
"""


@pytest.mark.slow
def test_processors_without_an_instruction_for_fp16() -> None:
    pytest.importorskip("numba")
    machine = {**os.environ, "NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    subprocess.run([sys.executable, "-c", WIDENED], check=True, env=machine, timeout=300)
