"""Products of tokens with weights that are stored in 16 bits, bf16 or fp16.

    y = x weight^T

A checkpoint in bf16 or fp16 loses nothing by being stored so, and a step that is bound by reading the weights takes
half as long as with fp32 ones. On a CPU, a kernel compiled by numba widens them in registers, and sums are fp32. A call
with many tokens converts a part of the rows at a time to the tokens' dtype and multiplies it as usual.

Shape letters: I inputs, O outputs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, library
from torch.nn import functional

from skipstone.ops.int8 import FEW, called, in_parts, in_place, product_shape

_namespace = library.Library("skipstone", "FRAGMENT")  # a torch operation, so that FLOP counters see it
_namespace.define("float16_linear(Tensor x, Tensor weight) -> Tensor")
library.register_fake("skipstone::float16_linear", product_shape, lib=_namespace)
NATIVE = torch.ops.skipstone.float16_linear

STEP = 32  # inputs that the kernel multiplies at a time


def format_of(weights: list[Tensor]) -> torch.dtype:
    """Return the 16-bit dtype, torch.bfloat16 or torch.float16, in which weights lose least.

    It is bf16 if that holds every number exactly, else fp16 if that does. Otherwise it is the one with the smaller sum
    of relative errors, one for each tensor: mostly fp16, whose rounding is finer, but bf16 where many numbers are too
    large or too small for fp16. weights: floating-point tensors. Raises ValueError for weights that are not finite.
    """
    if not all(bool(weight.isfinite().all()) for weight in weights):
        raise ValueError("weights that are not finite cannot be stored in 16 bits")
    for dtype in (torch.bfloat16, torch.float16):
        if all(torch.equal(weight.to(dtype).to(weight.dtype), weight) for weight in weights):
            return dtype
    return min((torch.float16, torch.bfloat16), key=lambda dtype: sum(_lost(weight, dtype) for weight in weights))


def _lost(weight: Tensor, dtype: torch.dtype) -> float:
    """Return the squared error of a tensor that is rounded to a dtype, relative to its sum of squares."""
    error = weight.to(dtype).to(weight.dtype) - weight
    lost, whole = (float(torch.linalg.vector_norm(x, dtype=torch.float64)) for x in (error, weight))
    return (lost / whole) ** 2 if whole else 0.0


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x weight^T, [..., O] in the dtype of x. Gradients reach x, not the weights.

    x: [..., I], fp32, bf16 or fp16. weight_OI: bf16 or fp16. Up to 8 tokens without gradients, on a CPU with numba, are
    multiplied with the weights as they are stored, in fp32, if I is a multiple of 32. Otherwise parts of the weights
    are converted to the dtype of x and multiplied as usual.
    """
    inputs = weight_OI.shape[1]
    if inputs % STEP or not in_place(x, inputs, FEW):
        return in_parts(lambda part: functional.linear(x, part.to(x.dtype)), inputs, weight_OI)
    return few_tokens(x, weight_OI)


def few_tokens(x: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x weight^T, [..., O] in the dtype of x, by the kernel that reads each weight once.

    It computes on a CPU and needs numba. x: [..., I], at most 8 tokens, no gradients. weight_OI: fp32, bf16 or fp16, I
    a multiple of 32.
    """
    return called(_native(), NATIVE, x, weight_OI)


@cache
def _native() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the numba kernel, also registered as a torch operation."""
    native: Callable[[Tensor, Tensor], Tensor] = import_module("skipstone.ops.float16_native").linear
    _namespace.impl("float16_linear", native, "CPU")
    return native
