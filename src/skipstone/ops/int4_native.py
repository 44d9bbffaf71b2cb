"""Products of few tokens with four-bit weights (`ops/int4.py`), compiled by numba for this processor.

A row of weights is read from memory once, whatever the number of tokens. Tokens are rounded to int16 and multiplied
with the numbers as integers; their sums over groups, which the offsets multiply, are computed once for all rows.
"""

from __future__ import annotations

import numpy as np
from torch import Tensor

from skipstone.ops.int4 import BLOCK, GROUP, inputs_of
from skipstone.ops.int4_dot import eight_rows, four_rows, one_row, two_rows, widen
from skipstone.ops.int8_linear_native import multiplied
from skipstone.ops.int8_native import SINGLE
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.neuron_sums import fetch
from skipstone.ops.workers import inner, unit

AHEAD = 1 << 13  # bytes from a row to the memory that is asked for
QUARTER = GROUP // 4  # pairs of int16 in half a group
WIDTH = 16  # numbers that are converted together
LINE = 64  # bytes


@inner
def _weave(x: Array, woven: Array, sums: Array) -> None:
    """Put a token's inputs in the order of the weights, a pair of int16 at a time, and add up those of each group.

    x, woven: the pairs, int32 [blocks, 2 groups, 2 halves, 8] and [blocks, 2 halves, 8, 2 groups]. sums: fp32.
    """
    for b in range(x.shape[0]):
        for half in range(2):
            for i in range(QUARTER):
                woven[b, half, i, 0] = x[b, 0, half, i]
                woven[b, half, i, 1] = x[b, 1, half, i]
        for g in range(2):
            total = np.int32(0)
            for half in range(2):
                for i in range(QUARTER):
                    pair = x[b, g, half, i]
                    total += np.int32(pair >> np.int32(16)) + np.int32(np.int16(pair & np.int32(0xFFFF)))
            sums[2 * b + g] = np.float32(total)


@inner
def _prepared(x_at: int, tokens: int, inputs: int, memory: Array) -> Array:
    """Weave all tokens into aligned memory; return the addresses there of a row's factors, of tokens and of sums."""
    start = memory.ctypes.data + -memory.ctypes.data % LINE
    groups, row, blocks = inputs // GROUP, 2 * inputs, inputs // BLOCK
    apart = 4 * _padded(groups)
    sums_at = start + 2 * apart
    x = sums_at + tokens * apart + -(tokens * apart) % LINE
    for n in range(tokens):
        token = _lying(x_at + n * row, (blocks, 2, 2, QUARTER), np.int32(0))
        woven = _lying(x + n * row, (blocks, 2, QUARTER, 2), np.int32(0))
        _weave(token, woven, _lying(sums_at + n * apart, (groups,), SINGLE))
    return start, x, sums_at


@inner
def _padded(groups: int) -> int:
    return -(-groups // WIDTH) * WIDTH


@inner
def _multiplied(matrix: Array, x_at: int, sums_at: int, inputs: int, unit: Array, y: Array) -> None:
    """Multiply one row with all tokens. matrix: addresses of its numbers, and of its offsets and scales in fp32."""
    (weight, offset, scale), row, apart, n = matrix, 2 * inputs, 4 * _padded(inputs // GROUP), 0
    tokens, padded, blocks = len(y), apart // 4, inputs // BLOCK
    while n + 8 <= tokens:
        a, b, c, d, e, f, g, h = eight_rows(weight, offset, scale, x_at, row, sums_at, apart, padded, blocks)
        y[n], y[n + 1], y[n + 2], y[n + 3] = a * unit[n], b * unit[n + 1], c * unit[n + 2], d * unit[n + 3]
        y[n + 4], y[n + 5] = e * unit[n + 4], f * unit[n + 5]
        y[n + 6], y[n + 7] = g * unit[n + 6], h * unit[n + 7]
        n, x_at, sums_at = n + 8, x_at + 8 * row, sums_at + 8 * apart
    if n + 4 <= tokens:
        a, b, c, d = four_rows(weight, offset, scale, x_at, row, sums_at, apart, padded, blocks)
        y[n], y[n + 1], y[n + 2], y[n + 3] = a * unit[n], b * unit[n + 1], c * unit[n + 2], d * unit[n + 3]
        n, x_at, sums_at = n + 4, x_at + 4 * row, sums_at + 4 * apart
    if n + 2 <= tokens:
        e, f = two_rows(weight, offset, scale, x_at, row, sums_at, apart, padded, blocks)
        y[n], y[n + 1] = e * unit[n], f * unit[n + 1]
        n, x_at, sums_at = n + 2, x_at + 2 * row, sums_at + 2 * apart
    if n < tokens:
        (g,) = one_row(weight, offset, scale, x_at, row, sums_at, apart, padded, blocks)
        y[n] = g * unit[n]


@unit(12)
def four_bit_rows(
    weight_at: int,
    _scale_at: int,
    bias_at: int,
    _scales: int,
    x_at: int,
    unit_at: int,
    y_at: int,
    tokens: int,
    outputs: int,
    inputs: int,
    first: int,
    last: int,
) -> None:
    """Multiply N tokens, rounded to int16, with rows `first` to `last` - 1 of a four-bit matrix; compiled by numba.

    weight_at, bias_at: the addresses of the four-bit weights [O, P], P = 5 I / 8 bytes a row, and of fp32 biases (0:
    none). x_at, unit_at: the addresses of the int16 tokens and of the factors that restore them. y_at: the address of
    the fp32 outputs [N, O], of which these columns are written. tokens, outputs, inputs: N, O and I, a multiple of 64.
    The other arguments are unused: the kernel for int8 weights, in whose place this one is called, needs them.
    """
    if last <= first:
        return
    y, unit = _lying(y_at, (tokens, outputs), SINGLE), _lying(unit_at, (tokens,), SINGLE)
    groups, pitch = inputs // GROUP, inputs // 8 * 5
    padded = _padded(groups)
    memory = np.zeros(tokens * (2 * inputs + 4 * padded) + 8 * padded + 2 * LINE, np.uint8)
    offset, x, sums_at = _prepared(x_at, tokens, inputs, memory)
    factors = _lying(offset, (2 * padded,), SINGLE)
    for o in range(first, last):
        start = weight_at + o * pitch
        fetch(start + AHEAD, pitch)
        widen(start, offset, 2 * groups)
        for i in range(2 * groups, padded):
            factors[i] = SINGLE  # what lies behind the scales of a narrow row may be NaN
        _multiplied((start + 4 * groups, offset, offset + 4 * groups), x, sums_at, inputs, unit, y[:, o])
    if bias_at:
        bias = _lying(bias_at, (outputs,), SINGLE)
        for n in range(tokens):
            for o in range(first, last):
                y[n, o] += bias[o]
    memory[0] = 0  # so that it is not freed before


def linear(x: Tensor, weight_OP: Tensor) -> Tensor:
    """Return x weight^T, [..., O] in the dtype of x, reading each four-bit weight from memory once.

    x: [..., I], meant for few tokens of I inputs, with no limit. weight_OP: uint8 [O, P], P = 5 I / 8 bytes for each of
    O outputs (`int4.pack`).
    """
    weight_OP = weight_OP.contiguous()
    matrix = (weight_OP.data_ptr(), 0, 0, 0)
    return multiplied(x, four_bit_rows, matrix, (len(weight_OP), inputs_of(weight_OP)))
