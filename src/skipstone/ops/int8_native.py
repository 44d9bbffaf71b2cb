"""Products of few tokens with int8 weights, compiled by numba for this processor.

A row of weights is read from memory once, whatever the number of tokens. Where the number of inputs is a multiple of
64, or each 32 inputs have a scale, tokens are rounded to int16 and multiplied with the int8 weights as integers, a
group at a time (`int8_dot.py`); the groups' sums are added in fp32. Other widths are computed in fp32 throughout.

Shape letters: N tokens, I inputs, O outputs.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.int8_dot import (
    FINE,
    GROUP,
    eight_fine,
    eight_tokens,
    four_fine,
    four_tokens,
    one_fine,
    one_token,
    two_fine,
    two_tokens,
)
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import BARRIER, call, inner, integers, part_of, parts_of, team, unit, wait

UNITS = np.int32(0x7FFFFFFF)  # the bits of a number but its sign
NOT_FINITE = np.int32(0x7F800000)  # and those of infinity; those of NaN are greater
SINGLE = np.float32(0)


@unit(5)
def round_tokens(x_at: int, rounded_at: int, unit_at: int, tokens: int, inputs: int) -> None:
    """Round N fp32 tokens [N, I] to int16, each by its largest magnitude; compiled by numba.

    x_at, rounded_at, unit_at: the addresses of the fp32 tokens, of the int16 result and of the fp32 factors [N] that
    restore it; result and factors are written, with factor NaN for a token that is not finite. tokens, inputs: N and I.
    """
    x, unit = _lying(x_at, (tokens, inputs), SINGLE), _lying(unit_at, (tokens,), SINGLE)
    rounded = _lying(rounded_at, (tokens, inputs), np.int16(0))
    bits = _lying(x_at, (tokens, inputs), np.int32(0))
    for n in range(tokens):
        most = np.int32(0)
        for i in range(inputs):  # as integers, which are compared several at a time
            most = max(most, np.int32(bits[n, i] & UNITS))
        largest = np.int32(most).view(np.float32)
        unit[n] = largest / np.float32(32767) if most < NOT_FINITE else np.float32(np.nan)
        factor = np.float32(32767) / largest if most > 0 else SINGLE
        for i in range(inputs):
            rounded[n, i] = np.int16(np.int32(np.rint(x[n, i] * factor)))


@inner
def _one_product(fine: bool, weight: int, scale: int, stride: int, x: int, row: int, groups: int) -> Array:
    if fine:
        return one_fine(weight, scale, stride, x, row, groups)
    return one_token(weight, scale, stride, x, row, groups)


@inner
def _two_products(fine: bool, weight: int, scale: int, stride: int, x: int, row: int, groups: int) -> Array:
    if fine:
        return two_fine(weight, scale, stride, x, row, groups)
    return two_tokens(weight, scale, stride, x, row, groups)


@inner
def _four_products(fine: bool, weight: int, scale: int, stride: int, x: int, row: int, groups: int) -> Array:
    if fine:
        return four_fine(weight, scale, stride, x, row, groups)
    return four_tokens(weight, scale, stride, x, row, groups)


@inner
def _eight_products(fine: bool, weight: int, scale: int, stride: int, x: int, row: int, groups: int) -> Array:
    if fine:
        return eight_fine(weight, scale, stride, x, row, groups)
    return eight_tokens(weight, scale, stride, x, row, groups)


@unit(12)
def grouped_rows(
    weight_at: int,
    scale_at: int,
    bias_at: int,
    scales: int,
    x_at: int,
    unit_at: int,
    y_at: int,
    tokens: int,
    outputs: int,
    inputs: int,
    first: int,
    last: int,
) -> None:
    """Multiply N tokens, rounded to int16, with rows `first` to `last` - 1 of an int8 matrix; compiled by numba.

    weight_at, scale_at, bias_at: the addresses of int8 weights [O, I], of their fp32 scales and of fp32 biases (0:
    none). scales: scales per output: 1, or one for each 64 or 32 inputs. x_at, unit_at: the addresses of the int16
    tokens and of the factors that restore them. y_at: the address of the fp32 outputs [N, O], of which these columns
    are written. tokens, outputs, inputs: N, O and I, a multiple of 64, or of 32 with a scale for each 32.
    """
    y, unit = _lying(y_at, (tokens, outputs), SINGLE), _lying(unit_at, (tokens,), SINGLE)
    fine, stride, row = scales * FINE == inputs, 4 if scales > 1 else 0, 2 * inputs
    groups = scales if fine else inputs // GROUP
    for o in range(first, last):
        weight, scale, n = weight_at + o * inputs, scale_at + o * scales * 4, 0
        while n + 8 <= tokens:
            a, b, c, d, e, f, g, h = _eight_products(fine, weight, scale, stride, x_at + n * row, row, groups)
            y[n, o], y[n + 1, o] = a * unit[n], b * unit[n + 1]
            y[n + 2, o], y[n + 3, o] = c * unit[n + 2], d * unit[n + 3]
            y[n + 4, o], y[n + 5, o] = e * unit[n + 4], f * unit[n + 5]
            y[n + 6, o], y[n + 7, o] = g * unit[n + 6], h * unit[n + 7]
            n += 8
        if n + 4 <= tokens:
            a, b, c, d = _four_products(fine, weight, scale, stride, x_at + n * row, row, groups)
            y[n, o], y[n + 1, o] = a * unit[n], b * unit[n + 1]
            y[n + 2, o], y[n + 3, o] = c * unit[n + 2], d * unit[n + 3]
            n += 4
        if n + 2 <= tokens:
            e, f = _two_products(fine, weight, scale, stride, x_at + n * row, row, groups)
            y[n, o], y[n + 1, o] = e * unit[n], f * unit[n + 1]
            n += 2
        if n < tokens:
            (g,) = _one_product(fine, weight, scale, stride, x_at + n * row, row, groups)
            y[n, o] = g * unit[n]
    if bias_at:
        bias = _lying(bias_at, (outputs,), SINGLE)
        for n in range(tokens):
            for o in range(first, last):
                y[n, o] += bias[o]


@unit(12)
def single_rows(
    weight_at: int,
    scale_at: int,
    _bias_at: int,
    _scales: int,
    x_at: int,
    _unit_at: int,
    y_at: int,
    tokens: int,
    outputs: int,
    inputs: int,
    first: int,
    last: int,
) -> None:
    """Multiply N fp32 tokens with rows `first` to `last` - 1 of an int8 matrix of any width; compiled by numba.

    It takes the place of `grouped_rows` where the number of inputs is not a multiple of 64. weight_at, scale_at: the
    addresses of int8 weights [O, I] and of their fp32 scales [O]. x_at, y_at: the addresses of the fp32 tokens [N, I]
    and outputs [N, O]. tokens, outputs, inputs: N, O, I. The other arguments are unused; biases are not added.
    """
    single = np.float32(0)
    weight, scale = _lying(weight_at, (outputs, inputs), np.int8(0)), _lying(scale_at, (outputs,), single)
    x, y = _lying(x_at, (tokens, inputs), single), _lying(y_at, (tokens, outputs), single)
    if tokens == 1:
        _one(weight, scale, x[0], y[0], first, last)
        return
    whole, most = last - (last - first) % 2, tokens - tokens % 4
    for o in range(first, whole, 2):
        for n in range(0, most, 4):
            _two_by_four(weight, scale, x, y, o, n)
        for n in range(most, tokens):
            a = b = single
            for i in range(inputs):
                a += np.float32(weight[o, i]) * x[n, i]
                b += np.float32(weight[o + 1, i]) * x[n, i]
            y[n, o], y[n, o + 1] = a * scale[o], b * scale[o + 1]
    if whole < last:
        for n in range(tokens):
            _one(weight, scale, x[n], y[n], whole, last)


@inner
def _one(weight: Array, scale: Array, x: Array, y: Array, first: int, last: int) -> None:
    """Write the products of one token x [I] with the int8 rows `first` to `last` - 1 to y [O], in fp32.

    Rows are read one after the other, as they lie in memory: more than twice as fast as four at once.
    """
    for o in range(first, last):
        total = np.float32(0)
        for i in range(len(x)):
            total += np.float32(weight[o, i]) * x[i]
        y[o] = total * scale[o]


@inner
def _two_by_four(weight: Array, scale: Array, x: Array, y: Array, o: int, n: int) -> None:
    """Write the products of the int8 rows o and o + 1 with the tokens n to n + 3 to y [N, O], in fp32.

    Each weight is converted to fp32 once for the four tokens. scale: fp32 [O]. x: fp32 [N, I].
    """
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for i in range(x.shape[1]):
        v, w = np.float32(weight[o, i]), np.float32(weight[o + 1, i])
        x0, x1, x2, x3 = x[n, i], x[n + 1, i], x[n + 2, i], x[n + 3, i]
        a0 += v * x0
        a1 += v * x1
        a2 += v * x2
        a3 += v * x3
        b0 += w * x0
        b1 += w * x1
        b2 += w * x2
        b3 += w * x3
    s, t = scale[o], scale[o + 1]
    y[n, o], y[n + 1, o], y[n + 2, o], y[n + 3, o] = a0 * s, a1 * s, a2 * s, a3 * s
    y[n, o + 1], y[n + 1, o + 1], y[n + 2, o + 1], y[n + 3, o + 1] = b0 * t, b1 * t, b2 * t, b3 * t


@team
def crew(packet: int) -> None:
    """Compute one thread's part of the outputs of a product of tokens with a stored matrix; compiled by numba.

    packet: address of the arguments in memory, where `workers.share` has stored them.
    """
    numbers, (rows,), part, parts = integers(packet, 0, 10), integers(packet, 10, 1), part_of(packet), parts_of(packet)
    outputs = numbers[8]
    each = -(-outputs // (4 * parts)) * 4
    call(rows, numbers + (min(part * each, outputs), min((part + 1) * each, outputs)))  # noqa: RUF005
    if parts > 1:
        wait(packet + BARRIER, parts)  # asleep after a while; OpenMP would spin for milliseconds
