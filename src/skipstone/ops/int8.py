"""Products with int8 weights that have one fp32 scale for each row, or for each group of 64 or 32 inputs in it.

    y = x (scale * weight)^T

A call with few tokens is bound by reading the weights; on a CPU, a kernel compiled by numba reads them once, as they
are stored. Where the kernel cannot be used (`linear`), a part of the rows at a time is converted to floating point and
multiplied as usual.

Shape letters: N tokens, I inputs, O outputs, G groups of inputs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache, partial
from importlib import import_module

import torch
from torch import Tensor, library
from torch.nn import functional


def product_shape(x: Tensor, weight: Tensor, *others: Tensor) -> Tensor:
    """Return an empty tensor in the shape and dtype of a product of tokens with a matrix that is stored row by row.

    It stands for the product where torch computes shapes alone (FakeTensorMode). x: the tokens [..., I]. weight: [O,
    ...]. others: the product's further arguments, such as scales; not used. Returns [..., O].
    """
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_namespace = library.Library("skipstone", "FRAGMENT")  # a torch operation, so that FLOP counters see it
_namespace.define("int8_linear(Tensor x, Tensor weight, Tensor scale) -> Tensor")
library.register_fake("skipstone::int8_linear", product_shape, lib=_namespace)
NATIVE = torch.ops.skipstone.int8_linear

FEW = 8  # tokens of a call up to which weights are read as they are stored where tokens are not rounded to integers
PART = 1 << 20  # numbers that are restored at a time
LARGEST = 127
GROUP = 64  # inputs that share a scale
FINE = 32  # the same in files of other programs, whose weights are kept exactly
LOOKED_AT = 64  # groups by which `on_a_grid` decides
LIKELY = (127, 126, 125, 16, 15, 8, 7)  # the largest factors of a group in Q8_0, Q5_0 and Q4_0
NO_NUMBA = (
    "weights in 16, 8 or 4 bits are restored before they are multiplied, which is slower than fp32: "
    "pip install 'skipstone[numba]' reads them as they are"
)


def quantise(weight_OI: Tensor, group: int | None = None) -> tuple[Tensor, Tensor]:
    """Round a weight matrix to int8, with one scale for each row or for each group of inputs.

    weight_OI: [O, I] (outputs, inputs). group: number of inputs that share a scale, a divisor of I; None means a whole
    row. In groups of 32, weights that are integer multiples, up to 127-fold, of one number in each group (`on_a_grid`)
    keep their values. Returns the numbers, int8 [O, I] in [-127, 127], and their fp32 scales, [O], or [O, I / group] if
    `group` is given. Raises ValueError for weights that are not finite.
    """
    weight_OGI = weight_OI.detach().float().unflatten(1, (-1, group or weight_OI.shape[1]))
    largest_OG = weight_OGI.abs().amax(2)
    if not bool(largest_OG.isfinite().all()):
        raise ValueError("weights that are not finite cannot be rounded to int8")
    scale_OG = torch.where(largest_OG > 0, largest_OG / LARGEST, torch.ones_like(largest_OG))
    if group == FINE and on_a_grid(weight_OI):
        _steps(weight_OGI, largest_OG, scale_OG)
    number_OI = (weight_OGI / scale_OG[..., None]).round().clamp(-LARGEST, LARGEST).to(torch.int8).flatten(1)
    return number_OI, scale_OG[:, 0] if group is None else scale_OG


def on_a_grid(weight_OI: Tensor) -> bool:
    """Return whether all weights are integer multiples, up to 127-fold, of one number per group of 32 inputs.

    That is so for weights from blocks such as Q8_0, Q5_0 or Q4_0 of llama.cpp, and hardly for any others. weight_OI:
    [O, I]; if I is not a multiple of 32, the result is False. Only 64 groups, spread over the matrix, are looked at.
    """
    if weight_OI.shape[1] % FINE or not weight_OI.numel():
        return False
    group_GI = weight_OI.detach().reshape(-1, FINE)
    spread = torch.linspace(0, len(group_GI) - 1, LOOKED_AT, dtype=torch.float64)  # fp32 would round large indices up
    some_GI = group_GI[spread.long().to(weight_OI.device)].float()
    largest_G = some_GI.abs().amax(1)
    if bool(largest_G[0]) and not _has_step(some_GI[0]):  # one group tells of most matrices
        return False
    scale_G = torch.zeros_like(largest_G)
    _steps(some_GI, largest_G, scale_G)
    return bool(((scale_G > 0) | (largest_G == 0)).all())


def _has_step(weight_I: Tensor) -> bool:
    """Return whether all weights of a group, fp32 [I], are multiples of one number by factors up to 127."""
    step_F1 = weight_I.abs().amax() / torch.arange(1, LARGEST + 1, device=weight_I.device)[:, None]
    return bool(((weight_I / step_F1).round() * step_F1 == weight_I).all(1).any())


def _steps(weight_GI: Tensor, largest_G: Tensor, scale_G: Tensor) -> None:
    """Write to a group's scale a number of which all its weights are multiples by factors up to 127, if there is one.

    weight_GI: fp32 [..., I]. largest_G: the largest magnitude of each group.
    """
    w, largest, scale = weight_GI.reshape(-1, weight_GI.shape[-1]), largest_G.reshape(-1), scale_G.view(-1)
    left = (largest > 0).nonzero()[:, 0]
    for factor in dict.fromkeys((*LIKELY, *range(LARGEST, 0, -1))):
        step = largest[left] / factor
        found = (((w[left] / step[:, None]).round() * step[:, None]) == w[left]).all(1)
        scale[left[found]] = step[found]
        left = left[~found]
        if not len(left):
            return


def restore(weight_OI: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight matrix scale * weight in `dtype`.

    weight_OI: int8 [O, I]. scale: [O], or [O, G] for G groups of inputs.
    """
    scale_OG = scale.float().reshape(len(scale), -1)
    weight_OGI = weight_OI.float().unflatten(1, (scale_OG.shape[1], -1))
    return (weight_OGI * scale_OG[..., None]).flatten(1).to(dtype)


def linear(x: Tensor, weight_OI: Tensor, scale: Tensor) -> Tensor:
    """Return x (scale * weight)^T, [..., O] in the dtype of x. Gradients reach x, not the weights.

    x: [..., I], fp32, bf16 or fp16. weight_OI: int8. scale: fp32 [O], [O, I / 64] or [O, I / 32].

    Calls without gradients on a CPU with numba read the int8 weights as they are stored, with any number of tokens if I
    is a multiple of 64 and the weights are contiguous, otherwise with up to 8. The tokens are rounded to int16 if I is
    a multiple of 64 or each 32 inputs have a scale, and are fp32 otherwise. All other calls restore parts of the
    weights in the dtype of x and multiply as usual.
    """
    inputs = weight_OI.shape[1]
    if not in_place(x, inputs, None if weight_OI.is_contiguous() and inputs % GROUP == 0 else FEW):
        return in_parts(partial(_part, x), inputs, weight_OI, scale)
    return called(_native(), NATIVE, x, weight_OI, scale)


def called(native: Callable[..., Tensor], operation: Callable[..., Tensor], x: Tensor, *given: object) -> Tensor:
    """Call a compiled function, or, where torch has to see the call, the torch operation that wraps this function.

    Torch has to see the call if a FLOP counter or a trace listens to operations, or if x is of a subclass of Tensor.
    native: the compiled function. operation: the torch operation. x, given: the arguments of either, x the first.
    Returns what is returned by the one that is called.
    """
    if type(x) is not Tensor or torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        return operation(x, *given)
    return native(x, *given)  # torch would take 20 microseconds to call it


def in_place(x: Tensor, inputs: int, most: int | None = None) -> bool:
    """Return whether a call multiplies with the weights as they are stored: without gradients, on a CPU with numba.

    x: the tokens [..., I]. inputs: the weight's number of inputs. most: the largest number of tokens for which the
    result is True; None means any number. It is False, too, for tokens whose width is not `inputs`; the ordinary
    product then raises an error.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return False
    return x.shape[-1] == inputs and x.numel() > 0 and (most is None or x.numel() <= most * inputs) and _kernels()


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
    linear: Callable[[Tensor, Tensor, Tensor], Tensor] = import_module("skipstone.ops.int8_linear_native").linear
    return linear


def in_parts(product: Callable[..., Tensor], inputs: int, *stored: Tensor) -> Tensor:
    """Return a product [..., O] of tokens with a stored matrix, computed for a part of the matrix's rows at a time.

    Only one part of the weights is restored at a time. product: called with a part of each of `stored`, returns the
    outputs of these rows, [..., part]. inputs: number of inputs of a row. stored: tensors with one entry for each row,
    such as weights and scales.
    """
    rows = max(PART // inputs, 1)
    parts = [product(*part) for part in zip(*(tensor.split(rows) for tensor in stored), strict=True)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _part(x: Tensor, weight_OI: Tensor, scale: Tensor) -> Tensor:
    if scale.dim() == 1 and x.dtype.itemsize > 2:  # in fp16, sums of products with unscaled weights can be too large
        return functional.linear(x, weight_OI.to(x.dtype)) * scale.to(x.dtype)
    return functional.linear(x, restore(weight_OI, scale, x.dtype))
