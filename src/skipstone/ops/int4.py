"""Products with four-bit weights: 32 inputs of a row share an fp16 scale and an fp16 offset.

    y = x (scale * number + offset)^T        number: 0 to 15

These are the blocks Q4_0 and Q4_1 of a GGUF file, whose values are kept exactly. A row lies in memory as one record:
its offsets, its scales, and its numbers, two to a byte, in an order in which a processor needs no shuffles (`_woven`).

Shape letters: N tokens, I inputs (a multiple of 64), O outputs, G groups of 32 inputs, P = 5 I / 8 bytes of a row.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch
from torch import Tensor, library
from torch.nn import functional

from skipstone.ops.int8 import called, in_parts, in_place, product_shape

_namespace = library.Library("skipstone", "FRAGMENT")  # a torch operation, so that FLOP counters see it
_namespace.define("int4_linear(Tensor x, Tensor weight) -> Tensor")
library.register_fake("skipstone::int4_linear", product_shape, lib=_namespace)
NATIVE = torch.ops.skipstone.int4_linear

GROUP = 32  # inputs that share a scale and an offset
BLOCK = 2 * GROUP  # inputs whose numbers lie together
MOST = 15  # the largest number
LARGEST = torch.finfo(torch.float16).max
SMALLEST = 2.0**-12  # scales of smaller weights have few digits in fp16
TRIED = tuple(MOST + step / 4 for step in range(-4, 5))  # numbers that the range of a group is divided into
AT_ONCE = 1 << 20  # weights that are rounded together


def serves(inputs: int) -> bool:
    """Return whether a matrix with this number of inputs can have four-bit weights: a multiple of 64 can."""
    return inputs % BLOCK == 0


def fits(weight_OI: Tensor) -> bool:
    """Return whether four-bit weights can store a matrix: its largest weight fits the range of the fp16 scales.

    weight_OI: [O, I]. The largest magnitude has to be 0, or from 2^-12 to 65,504.
    """
    largest = float(weight_OI.abs().max())
    return largest == 0 or SMALLEST <= largest <= LARGEST


def row_bytes(inputs: int) -> int:
    """Return the bytes of a four-bit row of `inputs` weights, a multiple of 64: five for every eight weights."""
    return inputs // 8 * 5


def inputs_of(weight_OP: Tensor) -> int:
    """Return the number of inputs I of a four-bit matrix.

    weight_OP: the matrix as `pack` returns it, uint8 [O, P] with P = 5 I / 8 bytes for each of O outputs.
    """
    return weight_OP.shape[1] // 5 * 8


def pack(number_OI: Tensor, scale_OG: Tensor, offset_OG: Tensor) -> Tensor:
    """Return the four-bit matrix with these numbers, scales and offsets, uint8 [O, P], P = 5 I / 8 bytes a row.

    number_OI: integers from 0 to 15, I a multiple of 64. scale_OG, offset_OG: fp16, one for each 32 inputs.
    """
    low, high = _woven(number_OI.to(torch.uint8)).unflatten(1, (-1, 2, GROUP)).unbind(2)
    parts = (offset_OG, scale_OG, (low | (high << 4)).flatten(1))
    return torch.cat([part.contiguous().view(torch.uint8) for part in parts], 1)


def unpack(weight_OP: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the parts of a four-bit matrix: numbers, uint8 [O, I], scales and offsets, fp16 [O, G] each.

    It inverts `pack`. weight_OP: uint8 [O, P], P = 5 I / 8 bytes for each of O outputs, I inputs in G groups of 32.
    """
    inputs = inputs_of(weight_OP)
    size = inputs // GROUP * 2
    offset, scale, packed = weight_OP.split([size, size, inputs // 2], 1)
    packed = packed.unflatten(1, (-1, GROUP))
    number_OI = _unwoven(torch.stack((packed & MOST, packed >> 4), 2).flatten(1))
    return number_OI, *(part.contiguous().view(torch.float16) for part in (scale, offset))


def factors(weight_OP: Tensor) -> Tensor:
    """Return the offsets of a four-bit matrix followed by its scales, fp16 [O, 2 G] for G groups of 32 inputs.

    weight_OP: the matrix as `pack` returns it, uint8 [O, P] with P bytes for each of O outputs.
    """
    return weight_OP[:, : inputs_of(weight_OP) // GROUP * 4].contiguous().view(torch.float16)


def _woven(number_OI: Tensor) -> Tensor:
    """Put the inputs of each block in the order in which they are multiplied.

    Four pairs of inputs alternate between the two groups of the block, so that the products of a vector belong to the
    one and the other in turn, and their scales are two neighbouring numbers. The first half of each group comes first.
    """
    return number_OI.unflatten(1, (-1, 2, 2, GROUP // 4, 2)).permute(0, 1, 3, 4, 2, 5).flatten(1)


def _unwoven(number_OI: Tensor) -> Tensor:
    return number_OI.unflatten(1, (-1, 2, GROUP // 4, 2, 2)).permute(0, 1, 4, 2, 3, 5).flatten(1)


def quantise(weight_OI: Tensor) -> Tensor:
    """Round a weight matrix to four bits and return it packed (`pack`), uint8 [O, P], P = 5 I / 8 bytes a row.

    weight_OI: [O, I], I a multiple of 64. For each group of 32 inputs, several scales are tried: each gives numbers
    from 0 to 15, to which a scale and an offset are fitted by least squares, and the fit with the smallest squared
    error is taken, as in `make_qkx2_quants` of llama.cpp. Raises ValueError for weights that are not finite, or whose
    largest magnitude is too large or too small for fp16 scales (`fits`).
    """
    if not bool(weight_OI.isfinite().all()):
        raise ValueError("weights that are not finite cannot be rounded to int4")
    if not fits(weight_OI):
        raise ValueError("the largest weight must lie between 2^-12 and 65504 for int4, whose scales are fp16")
    rows = max(AT_ONCE // weight_OI.shape[1], 1)
    return torch.cat([pack(*_rounded(part)) for part in weight_OI.detach().float().split(rows)])


def _rounded(weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return numbers, scales and offsets of the smallest squared error that was found."""
    w = weight_OI.unflatten(1, (-1, GROUP))
    low, high = w.amin(2), w.amax(2)
    best = _numbered(w, (high - low) / MOST, low)
    for steps in TRIED:
        number, _, _, _ = _numbered(w, (high - low) / steps, low)
        found = _numbered(w, *_fitted(w, number))
        better = found[-1] < best[-1]
        best = tuple(torch.where(better[..., *[None] * (x.dim() - 2)], x, y) for x, y in zip(found, best, strict=True))
    number, scale, offset, _ = best
    return number.flatten(1), scale, offset


def _numbered(w: Tensor, scale: Tensor, offset: Tensor) -> tuple[Tensor, ...]:
    """Return the numbers that a scale and an offset give, both in fp16, and the squared error of each group."""
    scale, offset = scale.half(), offset.half()
    by, start = scale.float()[..., None], offset.float()[..., None]
    number = ((w - start) / torch.where(by == 0, 1.0, by)).round().clamp(0, MOST)
    return number, scale, offset, (number * by + start - w).square().sum(-1)


def _fitted(w: Tensor, number: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and offset of least squares for these numbers; 0 and the mean if all are equal."""
    far, mean = number - number.mean(-1, keepdim=True), w.mean(-1)
    spread = far.square().sum(-1)
    scale = (far * w).sum(-1) / torch.where(spread == 0, 1.0, spread)
    return scale, mean - scale * number.mean(-1)


def restore(weight_OP: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the weight matrix scale * number + offset, [O, I] in `dtype`.

    weight_OP: uint8 [O, P], packed as `pack` returns it: a row's P = 5 I / 8 bytes hold numbers, scales and offsets.
    """
    number_OI, scale_OG, offset_OG = unpack(weight_OP)
    number_OGI = number_OI.unflatten(1, (-1, GROUP)).float()
    return (number_OGI * scale_OG.float()[..., None] + offset_OG.float()[..., None]).flatten(1).to(dtype)


def linear(x: Tensor, weight_OP: Tensor) -> Tensor:
    """Return x weight^T, [..., O] in the dtype of x, for a four-bit weight. Gradients reach x, not the weights.

    x: [..., I], fp32, bf16 or fp16. weight_OP: uint8 [O, P], as `pack` returns it, P = 5 I / 8 bytes a row. Without
    gradients, on a CPU with numba, tokens are rounded to int16 and multiplied with the numbers as they are stored: sums
    of 32 products are exact, and are scaled and added in fp32. Otherwise parts of the weights are restored in the dtype
    of x and multiplied as usual.
    """
    inputs = inputs_of(weight_OP)
    if not in_place(x, inputs):
        return in_parts(lambda part: functional.linear(x, restore(part, x.dtype)), inputs, weight_OP)
    return called(_native(), NATIVE, x, weight_OP)


@cache
def _native() -> Callable[[Tensor, Tensor], Tensor]:
    """Return the numba kernel, also registered as a torch operation."""
    native: Callable[[Tensor, Tensor], Tensor] = import_module("skipstone.ops.int4_native").linear
    _namespace.impl("int4_linear", native, "CPU")
    return native
