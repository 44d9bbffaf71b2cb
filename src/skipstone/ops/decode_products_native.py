"""Products, norms and the division of work that compiled steps of whole blocks consist of.

Several threads share the rows of every matrix and wait for each other; norms and roundings, which take no time, are
repeated by each.

Shape letters: T tokens, D width.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.decode_step_native import ONE, _exp, compiled
from skipstone.ops.int8_native import grouped_rows, round_tokens
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import wait

ZERO = np.float32(0)


@compiled
def private(tokens: int, widest: int) -> int:
    """Return the bytes of working memory that each thread needs for itself; compiled by numba.

    tokens: number of tokens. widest: largest number of inputs of any matrix. The memory holds normalised tokens, tokens
    rounded to int16 and the factors that restore these.
    """
    return (6 * tokens * widest + 4 * tokens + 127) // 64 * 64


@compiled
def together(parts: int, barrier: int, arrivals: int) -> int:
    """Wait until all threads have arrived here, and return the count that ends the next wait; compiled by numba.

    parts: number of threads. barrier: its address. arrivals: count of arrivals before this wait.
    """
    if parts > 1:
        wait(barrier, arrivals + parts)
    return arrivals + parts


@compiled
def share_of(rows: int, part: int, parts: int) -> Array:
    """Return the first row that one thread computes and the row after its last one; compiled by numba.

    rows: total number of rows. part, parts: index and number of threads.
    """
    each = -(-rows // (16 * parts)) * 16
    return min(part * each, rows), min((part + 1) * each, rows)


@compiled
def norm(x: Array, weight_at: int, eps: float, offset: float, out_at: int) -> None:
    """Normalise x [T, D] by root mean square, or copy it; compiled by numba.

    weight_at: address of the weight; 0 means that x is copied. eps: added to the mean square. offset: added to the
    weight. out_at: address of the result.
    """
    out = _lying(out_at, x.shape, ONE)
    for n in range(x.shape[0]):
        norm_row(x[n], weight_at, eps, offset, out[n])


@compiled
def norm_row(x: Array, weight_at: int, eps: float, offset: float, out: Array) -> None:
    """Normalise one token x [D] by root mean square into `out`, which may be x, or copy it; compiled by numba.

    weight_at: address of the weight; 0 means that x is copied. eps: added to the mean square. offset: added to the
    weight.
    """
    width = len(x)
    if not weight_at:
        for d in range(width):
            out[d] = x[d]
        return
    weight, total, more = _lying(weight_at, (width,), ONE), ZERO, np.float32(offset)
    for d in range(width):
        total += x[d] * x[d]
    factor = np.float32(1 / np.sqrt(total / np.float32(width) + np.float32(eps)))
    for d in range(width):
        out[d] = x[d] * factor * (weight[d] + more)


@compiled
def rounded(wanted: int, x_at: int, places: Array, tokens: int, width: int) -> None:
    """Round fp32 tokens to int16 for products with int8 weights; compiled by numba.

    wanted: 0 means that nothing is done. x_at: address of the tokens. places: addresses: the second is where the int16
    numbers are written, the third where the factors that restore them are. tokens, width: number of tokens, and of
    inputs.
    """
    if wanted:
        round_tokens((x_at, places[1], places[2]), (tokens, 0, width, 0))


@compiled
def product(matrix: Array, sizes: Array, x_at: int, places: Array, y_at: int, part: int, parts: int) -> None:
    """Multiply tokens with one matrix, for one thread's share of its outputs; compiled by numba.

    matrix: the addresses of weight, scale (0 if the weight is fp32) and bias (0 if there is none), and number of scales
    per row. sizes: tokens, outputs, inputs. x_at: address of the fp32 tokens. places: addresses of which the second and
    third hold the rounded tokens. y_at: address of the result. part, parts: index and number of threads.
    """
    weight_at, scale_at, bias_at, scales = matrix[0], matrix[1], matrix[2], matrix[3]
    tokens, outputs, inputs = sizes
    first, last = share_of(outputs, part, parts)
    if scale_at:
        addresses = (weight_at, scale_at, x_at, y_at, places[1], places[2])
        grouped_rows(addresses, (tokens, outputs, inputs, scales), first, last)
    else:
        weight, x = _lying(weight_at, (outputs, inputs), ONE), _lying(x_at, (tokens, inputs), ONE)
        single_rows(weight, x, _lying(y_at, (tokens, outputs), ONE), first, last)
    if bias_at:
        bias, y = _lying(bias_at, (outputs,), ONE), _lying(y_at, (tokens, outputs), ONE)
        for n in range(tokens):
            for o in range(first, last):
                y[n, o] += bias[o]


@compiled
def single_rows(weight: Array, x: Array, y: Array, first: int, last: int) -> None:
    """Multiply rows `first` to `last` - 1 of an fp32 weight [O, I] with tokens x [T, I] into y [T, O].

    Compiled by numba, for up to four tokens at a time.
    """
    tokens, inputs = x.shape
    for o in range(first, last):
        n = 0
        while n + 4 <= tokens:
            a = b = c = d = ZERO
            for i in range(inputs):
                w = weight[o, i]
                a += w * x[n, i]
                b += w * x[n + 1, i]
                c += w * x[n + 2, i]
                d += w * x[n + 3, i]
            y[n, o], y[n + 1, o], y[n + 2, o], y[n + 3, o] = a, b, c, d
            n += 4
        while n < tokens:
            total = ZERO
            for i in range(inputs):
                total += weight[o, i] * x[n, i]
            y[n, o] = total
            n += 1


@compiled
def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + e^-x) in fp32; compiled by numba."""
    small = _exp(-abs(x))
    return (np.float32(1) if x >= 0 else small) / (np.float32(1) + small)
