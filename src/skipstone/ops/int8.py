"""Products with int8 weights that have one fp32 scale for each row: y = x (scale * weight)^T.

A call with few tokens is bound by reading the weights; on a CPU, a kernel compiled by numba reads them once, as they
are stored. A call with many tokens restores a part of the rows at a time and multiplies it as usual.

Shape letters: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, library
from torch.nn import functional

_namespace = library.Library("skipstone", "FRAGMENT")  # a torch operation, so that FLOP counters see it
_namespace.define("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor")
NATIVE = torch.ops.skipstone.int8_linear

FEW = 8  # tokens of a call up to which weights are read as they are stored
PART = 1 << 20  # numbers that are restored at a time
LARGEST = 127
NO_NUMBA = (
    "int8 weights are restored before they are multiplied, which is slower than fp32: "
    "pip install 'skipstone[numba]' reads them as they are"
)


def quantise(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to int8, row by row.

    Returns int8 [O, I] in [-127, 127] and the fp32 scales [O] that restore the rows. Raises ValueError for weights that
    are not finite.
    """
    weight_OI = weight_OI.detach().float()
    largest_O = weight_OI.abs().amax(1)
    if not bool(largest_O.isfinite().all()):
        raise ValueError("weights that are not finite cannot be rounded to int8")
    scale_O = torch.where(largest_O > 0, largest_O / LARGEST, torch.ones_like(largest_O))
    return (weight_OI / scale_O[:, None]).round().clamp(-LARGEST, LARGEST).to(torch.int8), scale_O


def restore(weight_OI: Tensor, scale_O: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight matrix scale * weight in `dtype`."""
    return (weight_OI.float() * scale_O.float()[:, None]).to(dtype)


def linear(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return x (scale * weight)^T, [..., O] in the dtype of x, with sums in fp32 where weights are read in place.

    x: [..., I], fp32, bf16 or fp16. weight: int8. Gradients reach x, not the weights.
    """
    if not _in_place(x):
        return _in_parts(x, weight_OI, scale_O)
    if type(x) is not Tensor or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return NATIVE(x, weight_OI, scale_O)  # type: ignore[no-any-return]
    return _native()(x, weight_OI, scale_O)  # torch would take 20 microseconds to call it


def _in_place(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return 0 < x.numel() <= FEW * x.shape[-1] and _kernels()


@cache
def _kernels() -> bool:
    """Register the numba kernel as a torch operation; False without numba, after one warning of what that costs."""
    try:
        _namespace.impl("int8_linear", _native(), "CPU")
    except ImportError:
        warnings.warn(NO_NUMBA, stacklevel=2)
        return False
    return True


@cache
def _native() -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] = import_module("skipstone.ops.int8_native").linear
    return linear


def _in_parts(x: Tensor, weight_OI: Tensor, scale_O: Tensor) -> Tensor:
    """Return the same product by ordinary ones; only a part of the weights at a time is held in the dtype of x."""
    rows = max(PART // weight_OI.shape[1], 1)
    parts = [
        functional.linear(x, weight_OI[at : at + rows].to(x.dtype)) * scale_O[at : at + rows].to(x.dtype)
        for at in range(0, len(weight_OI), rows)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)
