"""Products with the weight rows of listed neurons: of the up matrix, and of the down matrix, stored neuron by neuron.

Reading all rows or some gives the same numbers, to the last bit: each neuron's product is computed alike, and sums over
neurons follow the order of the list.

Shape letters: K tokens, D width, F neurons, M groups of 64 neurons that share int8 scales.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.int8_dot import GROUP, _dots
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.neuron_sums import (
    LINE,
    fetch,
    four_narrow,
    int8_four_narrow,
    int8_one_narrow,
    int8_one_wide,
    one_narrow,
    one_wide,
)
from skipstone.ops.workers import call, inner, unit

ONE, ZERO = np.float32(0), np.float32(0)  # a number of the kind to read
AT_ONCE = 4  # rows that are multiplied with a token together
ROWS = 4  # fp32 rows that are added to all outputs before the next ones are read
PAIRS = 4  # the same for pairs of int8 rows
one_apart, two_apart, four_apart, eight_apart = (_dots(tokens, 0) for tokens in (1, 2, 4, 8))


@inner
def multiplied_single(weight_at: int, x_at: int, width: int, rows: Array, h: Array, single: int) -> None:
    """Multiply tokens with the fp32 rows of listed neurons; compiled by numba.

    One to three tokens are multiplied with four rows at a time; if the rows are no multiple of four, the last is
    repeated, so that all products are computed alike. weight_at, x_at: addresses of the fp32 weight [F, width] and of
    the tokens [K, width]. rows: indices of the neurons. h: fp32 [K, F], K tokens and F neurons, where the products are
    written. single: the address of `decode_products_native.single_rows`, which is called for each row if there are four
    tokens or more.
    """
    (K, F), count = h.shape, len(rows)
    weight, x = _lying(weight_at, (F, width), ONE), _lying(x_at, (K, width), ONE)
    for j in range(0, count if K < AT_ONCE else 0, AT_ONCE):
        last = min(j + AT_ONCE, count) - 1
        r0, r1, r2, r3 = rows[j], rows[min(j + 1, last)], rows[min(j + 2, last)], rows[last]
        for n in range(K):
            s0 = s1 = s2 = s3 = ZERO
            for i in range(width):
                s0 += weight[r0, i] * x[n, i]
                s1 += weight[r1, i] * x[n, i]
                s2 += weight[r2, i] * x[n, i]
                s3 += weight[r3, i] * x[n, i]
            h[n, r0], h[n, r1], h[n, r2], h[n, r3] = s0, s1, s2, s3
    for j in range(count if K >= AT_ONCE else 0):
        call(single, (weight_at, 0, 0, 1, x_at, 0, h.ctypes.data, K, F, width, rows[j], rows[j] + 1))


@inner
def multiplied_int8(matrix: Array, places: Array, width: int, rows: Array, h: Array) -> None:
    """Multiply tokens with the int8 rows of listed neurons, while the row after the next is prefetched.

    Compiled by numba. matrix: addresses of weight [F, width], scales and bias (not read), and number of scales per row.
    places: addresses of the tokens rounded to int16 and of the factors that restore them. width: inputs of the matrix.
    rows: indices of the neurons. h: fp32 [K, F] for K tokens and F neurons, where the products are written.
    """
    weight_at, scale_at, scales, (x_at, unit_at) = matrix[0], matrix[1], matrix[3], places
    K, groups, stride, row = h.shape[0], width // GROUP, 4 if scales > 1 else 0, 2 * width
    unit = _lying(unit_at, (K,), ONE)
    for j in range(len(rows)):
        f, n = rows[j], 0
        if j + 2 < len(rows):
            fetch(weight_at + rows[j + 2] * width, width)
            fetch(scale_at + rows[j + 2] * scales * 4, 4 * scales)
        weight, scale = weight_at + f * width, scale_at + f * scales * 4
        if n + 8 <= K:
            s = eight_apart(weight, scale, stride, x_at, row, groups)
            for k in range(8):
                h[k, f] = s[k] * unit[k]
            n += 8
        if n + 4 <= K:
            s0, s1, s2, s3 = four_apart(weight, scale, stride, x_at + n * row, row, groups)
            h[n, f], h[n + 1, f] = s0 * unit[n], s1 * unit[n + 1]
            h[n + 2, f], h[n + 3, f] = s2 * unit[n + 2], s3 * unit[n + 3]
            n += 4
        if n + 2 <= K:
            s0, s1 = two_apart(weight, scale, stride, x_at + n * row, row, groups)
            h[n, f], h[n + 1, f] = s0 * unit[n], s1 * unit[n + 1]
            n += 2
        if n < K:
            (s0,) = one_apart(weight, scale, stride, x_at + n * row, row, groups)
            h[n, f] = s0 * unit[n]


@unit(14)
def summed(
    weight_at: int,
    _scale_at: int,
    _scales: int,
    h_at: int,
    _rounded_at: int,
    _unit_at: int,
    tokens: int,
    neurons: int,
    width: int,
    rows_at: int,
    count: int,
    y_at: int,
    first: int,
    last: int,
) -> None:
    """Compute the down projection from listed neurons only, for its outputs `first` to `last` - 1; compiled by numba.

    weight_at: address of the fp32 weight, stored neuron by neuron, [F, D]. h_at: address of the down projection's
    inputs, fp32 [K, F]. tokens, neurons, width: K, F, D. rows_at, count: address and length of the list, int64. y_at:
    address of the result, fp32 [K, D]. first, last: multiples of 16, or D. The other arguments are unused: the kernel
    for int8 weights, which can take this one's place, needs them.
    """
    y, rows, K, F, D = _lying(y_at, (tokens, width), ONE), _lying(rows_at, (count,), 0), tokens, neurons, width
    _clear(y, first, last)
    if last <= first:
        return
    weight, h = _lying(weight_at, (F, D), ONE), _lying(h_at, (K, F), ONE)
    where, factor, whole = np.empty(count, np.int64), np.empty((K, count), np.float32), last - (last - first) % 16
    for j in range(count):
        where[j] = 4 * D * rows[j]
        for n in range(K):
            factor[n, j] = h[n, rows[j]]
    cursor = (min(2 * ROWS, count), 4 * first)
    for j in range(0, count, ROWS):
        now, n = min(ROWS, count - j), 0
        while n < K:
            own, d, step = factor.ctypes.data + 4 * (n * count + j), first, 16
            while d < whole:
                at, to = where.ctypes.data + 8 * j, y.ctypes.data + 4 * (n * D + d)
                if n + 4 <= K:
                    four_narrow(weight_at + 4 * d, at, now, own, 4 * count, to, 4 * D)
                elif d + 64 <= whole:
                    one_wide(weight_at + 4 * d, at, now, own, 0, to, 0)
                    step = 64
                else:
                    one_narrow(weight_at + 4 * d, at, now, own, 0, to, 0)
                    step = 16
                if n == 0:
                    cursor = _ask(weight_at, where, count, cursor, (4 * first, 4 * whole), 4 * now * step)
                d += step
            n += 4 if n + 4 <= K else 1
    for n in range(K):
        for d in range(whole, last):
            for f in rows:
                y[n, d] += h[n, f] * weight[f, d]


@unit(14)
def summed_int8(
    weight_at: int,
    scale_at: int,
    scales: int,
    _h_at: int,
    rounded_at: int,
    unit_at: int,
    tokens: int,
    neurons: int,
    width: int,
    rows_at: int,
    count: int,
    y_at: int,
    first: int,
    last: int,
) -> None:
    """Compute the down projection from listed neurons of an int8 weight, for outputs `first` to `last` - 1.

    Compiled by numba. The products of each of M groups of 64 neurons are summed as integers. weight_at: address of the
    int8 weight, stored neuron by neuron, [F, D]. scale_at: address of fp32 scales, [M, D] or [1, D]. scales: M or 1.
    _h_at: not used. rounded_at, unit_at: addresses of the inputs rounded to int16 [K, F], and of the K factors that
    restore them. tokens, neurons, width: K, F, D. rows_at, count: address and length of the list, int64. y_at: address
    of the result, fp32 [K, D]. first, last: multiples of 16, or D.
    """
    y, rows, K, F, D = _lying(y_at, (tokens, width), ONE), _lying(rows_at, (count,), 0), tokens, neurons, width
    _clear(y, first, last)
    if last <= first:
        return
    x, unit = _lying(rounded_at, (K, F), np.int16(0)), _lying(unit_at, (K,), ONE)
    where, factor, ends = np.empty(F, np.int64), np.empty((K, F // 2), np.int32), np.empty(F // GROUP, np.int64)
    _paired(rows, x, D, where, factor, ends)
    sums, start, cursor = np.zeros((K, D), np.int32), 0, (min(4 * PAIRS, 2 * ends[-1]), first)
    for m in range(len(ends)):
        end = ends[m]
        if scales > 1 and m + 1 < len(ends):
            fetch(scale_at + 4 * ((m + 1) * D + first), 4 * (last - first))
        for p in range(start, end, PAIRS):
            given = (weight_at, min(PAIRS, end - p), p, 2 * ends[-1])
            cursor = _added(given, where, factor, sums, first, last, cursor)
        if end > start:
            scale = _lying(scale_at + (4 * m * D if scales > 1 else 0), (D,), ONE)
            for n in range(K):
                for d in range(first, last):
                    y[n, d] += np.float32(sums[n, d]) * scale[d]
                    sums[n, d] = 0
        start = end
    for n in range(K):
        for d in range(first, last):
            y[n, d] *= unit[n]


@inner
def _clear(y: Array, first: int, last: int) -> None:
    for n in range(y.shape[0]):
        for d in range(first, last):
            y[n, d] = ZERO


@inner
def _ask(weight_at: int, where: Array, count: int, cursor: Array, part: Array, size: int) -> Array:
    """Prefetch the next `size` bytes of the listed rows, in the order of memory, and return the new cursor.

    Only bytes part[0] to part[1] of a row are prefetched: those that this thread reads. weight_at: address of the
    matrix. where: offset of each of `count` rows, in bytes. cursor: how far memory has been prefetched, as an index in
    the list and a byte of that row. In the order of use, which is a part of each row after the other, memory is a third
    slower.
    """
    row, byte = cursor
    for _ in range(-(-size // LINE)):
        if row < count:
            fetch(weight_at + where[row] + byte, 1)
            byte += LINE
            if byte >= part[1]:
                row, byte = row + 1, part[0]
    return row, byte


@inner
def _paired(rows: Array, x: Array, pitch: int, where: Array, factor: Array, ends: Array) -> None:
    """Arrange the listed rows in pairs within each group of 64 neurons, and write their offsets and factors.

    If a group has an odd number of rows, its last one is repeated with a factor of 0. rows: indices of the neurons,
    ascending. x: int16 [K, F]. pitch: bytes of a row. where: int64, the offsets of the two rows of each pair in bytes.
    factor: int32 [K, pairs], two int16 numbers of x for each pair. ends: int64 [M], the number of pairs up to the end
    of each group.
    """
    j, p = 0, 0
    for m in range(len(ends)):
        while j < len(rows) and rows[j] < (m + 1) * GROUP:
            f = rows[j]
            both = j + 1 < len(rows) and rows[j + 1] < (m + 1) * GROUP
            g = rows[j + 1] if both else f
            where[2 * p], where[2 * p + 1] = f * pitch, g * pitch
            for n in range(x.shape[0]):
                upper = np.int64(x[n, g]) if both else 0
                factor[n, p] = np.int32(np.int64(x[n, f]) & 0xFFFF | upper << 16)
            j += 2 if both else 1
            p += 1
        ends[m] = p


@inner
def _added(given: Array, where: Array, factor: Array, sums: Array, first: int, last: int, cursor: Array) -> Array:
    """Add some pairs of int8 rows, times their factors, to the integer sums [K, D], and return the cursor of `_ask`.

    given: address of the weight, number of pairs to add, index of the first of these, and number of rows of all pairs.
    where, factor: as `_paired` wrote them. first, last: the range of outputs. cursor: as in `_ask`.
    """
    (weight_at, pairs, p, count), (K, D), apart, n = given, sums.shape, 4 * factor.shape[1], 0
    where_at, factor_at = where.ctypes.data + 16 * p, factor.ctypes.data + 4 * p
    while n < K:
        own, d, step = factor_at + n * apart, first, 16
        while d < last:
            to = sums.ctypes.data + 4 * (n * D + d)
            if n + 4 <= K:
                int8_four_narrow(weight_at + d, where_at, pairs, own, apart, to, 4 * D)
            elif d + 64 <= last:
                int8_one_wide(weight_at + d, where_at, pairs, own, 0, to, 0)
                step = 64
            else:
                int8_one_narrow(weight_at + d, where_at, pairs, own, 0, to, 0)
                step = 16
            if n == 0:
                cursor = _ask(weight_at, where, count, cursor, (first, last), 2 * pairs * step)
            d += step
        n += 4 if n + 4 <= K else 1
    return cursor
