"""One token's MLP from the weights of the chosen neurons, compiled by numba for this processor.

The result is that of `magnitude.one_token`. Rows are read in place, eight at a time, because a single stream does not
use the whole memory bandwidth. Sums are fp32 whatever the weights' dtype; bf16 is read as the upper half of an fp32
number, because numba has no such type. Of equal scores the first are chosen. Tensors are passed by address, because
making numpy arrays of them would take a small model as long as its products.

Shape letters: D width, F neurons, J neurons that are on, G groups.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import torch
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import make_array, populate_array
from torch import Tensor

from skipstone.ops.kept_code import kept_njit
from skipstone.ops.workers import FAST, inner

AT_ONCE = 8  # rows read at a time; four take a quarter more time
SQUARE = 16
KINDS = {torch.float32: np.float32(0), torch.bfloat16: np.uint16(0)}
Array: TypeAlias = Any  # in numba: an array, or a tuple of addresses

compiled = kept_njit(fastmath=FAST, nogil=True)  # kept on disk, because compiling takes seconds


def one_token(
    x_11D: Tensor, a_11F: Tensor, typical_F: Tensor, up_FD: Tensor, down_FD: Tensor, tried: int, kept: int, size: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute one token's gated MLP from the neurons with the largest magnitudes only, by the compiled kernel.

    The `tried` groups with the largest mean of |a| typical_F are tried; of these, the `kept` groups with the largest
    mean of |a (up x)| are multiplied by the down projection. x_11D: the MLP's input. a_11F: activations of its gates.
    typical_F: fp32, typical magnitude of each neuron's up projection. up_FD: weight of the up projection. down_FD:
    transposed weight of the down projection; both are contiguous, fp32 or bf16, on a CPU. size: number of neurons per
    group. Returns the update [1, 1, D], and for each of the G groups [1, 1, G] its fp32 score, whether it was tried and
    whether it was kept.
    """
    F, D = up_FD.shape
    given = [x_11D.float().contiguous(), a_11F.float().contiguous(), typical_F.float(), up_FD, down_FD]
    y_11D, score_11G = torch.zeros(1, 1, D), torch.empty(1, 1, F // size)
    tried_11G, kept_11G = (torch.zeros(1, 1, F // size, dtype=torch.bool) for _ in range(2))
    addresses = tuple([x.data_ptr() for x in (*given, y_11D, score_11G, tried_11G, kept_11G)])
    _one_token(addresses, (D, F, size, tried, kept), KINDS[up_FD.dtype])
    return y_11D.to(x_11D.dtype), score_11G, tried_11G, kept_11G


def largest(score: Tensor, count: int) -> Tensor:
    """Return which values of each row are its `count` largest, as bool, about 4x faster than topk on a CPU.

    score: fp32 [..., G], not negative. Of equal values the first are chosen.
    """
    score, on = score.contiguous(), torch.zeros(score.shape, dtype=torch.bool)
    _largest(score.data_ptr(), on.data_ptr(), score.numel(), score.shape[-1], count)
    return on


def transposed(weight_DF: Tensor) -> Tensor:
    """Return the contiguous transpose [F, D] of weight_DF, an fp32 or bf16 matrix on a CPU."""
    weight_FD = weight_DF.new_empty(weight_DF.shape[::-1])
    _turn(*((x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy() for x in (weight_DF, weight_FD)))
    return weight_FD


@compiled
def _turn(x: Array, y: Array) -> None:
    """Write the transpose of x to y, in squares that fit the processor's caches: a quarter of a plain loop's time."""
    for i in range(0, x.shape[0], SQUARE):
        for j in range(0, x.shape[1], SQUARE):
            for b in range(j, min(j + SQUARE, x.shape[1])):
                for a in range(i, min(i + SQUARE, x.shape[0])):
                    y[b, a] = x[a, b]


@compiled
def _one_token(addresses: Array, sizes: Array, kind: Array) -> None:
    x_at, a_at, typical_at, up_at, down_at, y_at, score_at, tried_at, kept_at = addresses
    D, F, size, tried, kept = sizes
    single, groups = np.float32(0), F // size
    x, a, typical = _lying(x_at, (D,), single), _lying(a_at, (F,), single), _lying(typical_at, (F,), single)
    up, down, y = _lying(up_at, (F, D), kind), _lying(down_at, (F, D), kind), _lying(y_at, (D,), single)
    score = _lying(score_at, (groups,), single)
    on, left = _lying(tried_at, (groups,), False), _lying(kept_at, (groups,), False)
    for g in range(groups):
        total = np.float32(0)
        for f in range(g * size, (g + 1) * size):
            total += abs(a[f]) * typical[f]
        score[g] = total / size
    _mark(score, tried, on)
    row, h = np.empty(tried * size, np.int64), np.empty(tried * size, np.float32)
    _list(on, size, row)
    _products(x, up, row, h)
    for j in range(len(row)):
        h[j] *= a[row[j]]
    if kept == tried:
        left[:] = on
    else:
        h, row = _keep(h, row, kept, size, left)
    _total(h, down, row, y)


@inner
def _keep(h: Array, row: Array, kept: int, size: int, left: Array) -> Array:
    """Return the entries of h in the `kept` groups with the largest sums of |h|, and the indices of their neurons.

    h: a number for each neuron that was tried, in groups of `size`. row: the indices of these neurons. left: bool, one
    for each group of the MLP, set True for the groups that are kept.
    """
    magnitude, chosen = np.empty(len(h) // size, np.float32), np.zeros(len(h) // size, np.bool_)
    for k in range(len(magnitude)):
        total = np.float32(0)
        for j in range(k * size, (k + 1) * size):
            total += abs(h[j])
        magnitude[k] = total
    _mark(magnitude, kept, chosen)
    at = np.empty(kept * size, np.int64)
    _list(chosen, size, at)
    for j in range(len(at)):
        left[row[at[j]] // size] = True
    return h[at], row[at]


@compiled
def _largest(score_at: int, on_at: int, total: int, width: int, count: int) -> None:
    score, on = _lying(score_at, (total,), np.float32(0)), _lying(on_at, (total,), False)
    for g in range(0, total, width):
        _mark(score[g : g + width], count, on[g : g + width])


@inner
def _mark(score: Array, count: int, on: Array) -> None:
    """Set `on` True at the `count` largest scores; of equal scores, at the first.

    score: fp32, not negative; such floats sort like their bits, NaN above all others.
    """
    bits, least, places = score.view(np.int32), np.int32(0), count
    for power in range(30, -1, -1):  # find the largest number that at least `count` scores reach
        more, reached = least | np.int32(1 << power), np.int32(0)
        for g in range(len(bits)):
            reached += np.int32(bits[g] >= more)
        least = more if reached >= count else least
    for g in range(len(bits)):
        if bits[g] > least:
            on[g] = True
            places -= 1
    for g in range(len(bits)):
        if places and bits[g] == least:
            on[g] = True
            places -= 1


@inner
def _list(on: Array, size: int, row: Array) -> None:
    """Write the indices of the neurons whose groups are on to `row`, ascending. on: bool by group. size: of a group."""
    count = 0
    for g in range(len(on)):
        if on[g]:
            for f in range(g * size, (g + 1) * size):
                row[count] = f
                count += 1


@inner
def _products(x: Array, weight: Array, row: Array, out: Array) -> None:
    """Compute out[j] = weight[row[j]] . x, the products of a token x with the listed rows of a matrix."""
    whole = len(row) - len(row) % AT_ONCE
    for j in range(0, whole, AT_ONCE):
        r0, r1, r2, r3, r4, r5, r6, r7 = _eight(row, j)
        s0 = s1 = s2 = s3 = s4 = s5 = s6 = s7 = np.float32(0)
        for i in range(len(x)):
            s0 += _fp32(weight[r0, i]) * x[i]
            s1 += _fp32(weight[r1, i]) * x[i]
            s2 += _fp32(weight[r2, i]) * x[i]
            s3 += _fp32(weight[r3, i]) * x[i]
            s4 += _fp32(weight[r4, i]) * x[i]
            s5 += _fp32(weight[r5, i]) * x[i]
            s6 += _fp32(weight[r6, i]) * x[i]
            s7 += _fp32(weight[r7, i]) * x[i]
        out[j], out[j + 1], out[j + 2], out[j + 3] = s0, s1, s2, s3
        out[j + 4], out[j + 5], out[j + 6], out[j + 7] = s4, s5, s6, s7
    for j in range(whole, len(row)):
        alone = np.float32(0)
        for i in range(len(x)):
            alone += _fp32(weight[row[j], i]) * x[i]
        out[j] = alone


@inner
def _total(h: Array, weight: Array, row: Array, out: Array) -> None:
    """Add the sum over j of h[j] weight[row[j]] to out, for the listed rows of a matrix."""
    whole = len(row) - len(row) % AT_ONCE
    for j in range(0, whole, AT_ONCE):
        r0, r1, r2, r3, r4, r5, r6, r7 = _eight(row, j)
        h0, h1, h2, h3, h4, h5, h6, h7 = _eight(h, j)
        for o in range(len(out)):
            a = h0 * _fp32(weight[r0, o]) + h1 * _fp32(weight[r1, o])
            b = h2 * _fp32(weight[r2, o]) + h3 * _fp32(weight[r3, o])
            c = h4 * _fp32(weight[r4, o]) + h5 * _fp32(weight[r5, o])
            out[o] += a + b + c + (h6 * _fp32(weight[r6, o]) + h7 * _fp32(weight[r7, o]))
    for j in range(whole, len(row)):
        for o in range(len(out)):
            out[o] += h[j] * _fp32(weight[row[j], o])


@inner
def _eight(x: Array, j: int) -> Array:
    return x[j], x[j + 1], x[j + 2], x[j + 3], x[j + 4], x[j + 5], x[j + 6], x[j + 7]


# The functions below exist in compiled code only.


def _fp32(number):  # type: ignore[no-untyped-def]
    """Convert a number to fp32."""
    raise NotImplementedError


@overload(_fp32, inline="always")
def _fp32_of(number):  # type: ignore[no-untyped-def]
    if number == types.uint16:
        return lambda number: np.uint32(np.uint32(number) << np.uint32(16)).view(np.float32)
    return lambda number: number


@intrinsic
def _lying(context, address, shape, kind):  # type: ignore[no-untyped-def]
    """Return the contiguous array of this shape that lies at an address, with the dtype of the number `kind`.

    Numba's own `carray` would be compiled anew, as a function, for each kind and number of dimensions.
    """
    found = types.Array(types.unliteral(kind), len(shape), "C")

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        size = context.get_abi_sizeof(context.get_data_type(found.dtype))
        sizes = [
            context.cast(builder, number, one, types.intp)
            for number, one in zip(cgutils.unpack_tuple(builder, given[1]), shape, strict=True)
        ]
        strides = [context.get_constant(types.intp, size)]
        for number in sizes[:0:-1]:
            strides.insert(0, builder.mul(strides[0], number))
        array = make_array(found)(context, builder)
        data = builder.inttoptr(given[0], context.get_data_type(found.dtype).as_pointer())
        itemsize = context.get_constant(types.intp, size)
        populate_array(array, data=data, shape=sizes, strides=strides, itemsize=itemsize, meminfo=None)
        return array._getvalue()

    return found(types.int64, shape, kind), generate
