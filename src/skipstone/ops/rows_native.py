"""Rows of a matrix multiplied where they lie, compiled for this processor by numba; meaning and signature as in `rows`.

Four rows at a time, so that the vector is read from memory a quarter as often. Sums are of fp32, whatever the weights
are; bf16 is read as the upper half of an fp32 number, for the compiler has no such type.

Shape letters: I inputs, O outputs, F rows of a matrix, J of them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import njit, types
from numba.extending import overload
from torch import Tensor

AT_ONCE = 4
SUMS = {"reassoc", "contract", "nsz"}  # any order of adding, but infinities and NaN stay what they are


def products(x_I: Tensor, weight_FI: Tensor, row_J: Tensor) -> Tensor:
    out_J = torch.empty(len(row_J))
    _products(_wide(x_I), _numbers(weight_FI), row_J.numpy(), out_J.numpy())
    return out_J.to(x_I.dtype)


def total(h_J: Tensor, weight_FO: Tensor, row_J: Tensor) -> Tensor:
    out_O = torch.zeros(weight_FO.shape[1])
    _total(_wide(h_J), _numbers(weight_FO), row_J.numpy(), out_O.numpy())
    return out_O.to(h_J.dtype)


def _wide(x: Tensor) -> Any:
    return x.detach().float().contiguous().numpy()


def _numbers(weight: Tensor) -> Any:
    weight = weight.detach()
    return (weight.view(torch.uint16) if weight.dtype == torch.bfloat16 else weight).numpy()


def _fp32(number):  # type: ignore[no-untyped-def]
    raise NotImplementedError  # compiled code has its own, below


@overload(_fp32, inline="always")
def _fp32_of(number):  # type: ignore[no-untyped-def]
    if number == types.uint16:
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


@njit(fastmath=SUMS, nogil=True)  # type: ignore[untyped-decorator]
def _products(x: Any, weight: Any, row: Any, out: Any) -> None:
    whole = len(row) - len(row) % AT_ONCE
    for j in range(0, whole, AT_ONCE):
        a, b, c, d = row[j], row[j + 1], row[j + 2], row[j + 3]
        at_a = at_b = at_c = at_d = np.float32(0)
        for i in range(len(x)):
            at_a += _fp32(weight[a, i]) * x[i]
            at_b += _fp32(weight[b, i]) * x[i]
            at_c += _fp32(weight[c, i]) * x[i]
            at_d += _fp32(weight[d, i]) * x[i]
        out[j], out[j + 1], out[j + 2], out[j + 3] = at_a, at_b, at_c, at_d
    for j in range(whole, len(row)):
        alone = np.float32(0)
        for i in range(len(x)):
            alone += _fp32(weight[row[j], i]) * x[i]
        out[j] = alone


@njit(fastmath=SUMS, nogil=True)  # type: ignore[untyped-decorator]
def _total(h: Any, weight: Any, row: Any, out: Any) -> None:
    whole = len(row) - len(row) % AT_ONCE
    for j in range(0, whole, AT_ONCE):
        a, b, c, d = row[j], row[j + 1], row[j + 2], row[j + 3]
        for o in range(len(out)):
            pair = h[j] * _fp32(weight[a, o]) + h[j + 1] * _fp32(weight[b, o])
            out[o] += pair + h[j + 2] * _fp32(weight[c, o]) + h[j + 3] * _fp32(weight[d, o])
    for j in range(whole, len(row)):
        for o in range(len(out)):
            out[o] += h[j] * _fp32(weight[row[j], o])
