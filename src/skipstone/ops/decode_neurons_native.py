"""The up and down matrices of an MLP for the neurons that are on, in the compiled step of all blocks.

The gate matrix has been multiplied in full. What an MLP's own results choose (`core/stream_gate.py`: `NeuronChoice`) is
a list of neurons: those that at least one token needs, or all where that is nearly as many. Rows of the up matrix are
read for the neurons of the list, and rows of the down matrix, which lies in memory neuron by neuron. Reading all or
some gives the same numbers, to the last bit: each neuron's product is computed alike, and the sums over neurons are
chains in their order.

Shape letters: K tokens, D width, F neurons, G groups of neurons, M groups of 64 neurons that share int8 scales.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.decode_products_native import ZERO, single_rows
from skipstone.ops.decode_stack import DECISIONS
from skipstone.ops.decode_step_native import ONE, compiled
from skipstone.ops.int8_dot import GROUP, _dots
from skipstone.ops.magnitude_native import Array, _lying, _mark
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

# Columns of a choice in the table of a block: the decision (0: there is none), numbers of groups that are tried and
# kept, neurons of a group, the address of their typical sizes, and whether the down matrix lies neuron by neuron.
DECISION, TRIED, KEPT, SIZE, TYPICAL, BY_NEURON = range(6)
ZEROS, LARGEST = DECISIONS.index("zeros"), DECISIONS.index("largest")
WORTH = np.float32(0.9)  # the share of neurons up to which reading some is less work than reading all
AT_ONCE = 4  # rows that are multiplied with a token together
ROWS = 4  # fp32 rows that are added to all outputs before the next ones are read
PAIRS = 4  # the same for pairs of int8 rows
NEVER = np.float32(-1)  # below every score
one_apart, two_apart, four_apart, eight_apart = (_dots(tokens, 0) for tokens in (1, 2, 4, 8))


@compiled
def tried(choice: Array, a: Array, on: Array, scores: Array) -> None:
    """Choose the neurons for which the up matrix is multiplied, token by token; compiled by numba.

    choice: how neurons are chosen (columns as listed in this file). a: activations of the gates, fp32 [K, F] for K
    tokens and F neurons. on: bool [K, F], where the choice is written. scores: fp32 [K, G], where the score of each of
    G groups of neurons is written, by which the groups are chosen.
    """
    if choice[DECISION] == ZEROS:
        for n in range(a.shape[0]):
            for f in range(a.shape[1]):
                on[n, f] = a[n, f] != ZERO
                scores[n, f] = abs(a[n, f])
        return
    typical, size = _lying(choice[TYPICAL], (a.shape[1],), ONE), choice[SIZE]
    for n in range(a.shape[0]):
        for g in range(scores.shape[1]):
            total = ZERO
            for f in range(g * size, (g + 1) * size):
                total += abs(a[n, f]) * typical[f]
            scores[n, g] = total / np.float32(size)
        _spread(scores[n], choice[TRIED], size, on[n])


@compiled
def kept(choice: Array, h: Array, on: Array) -> None:
    """Drop from `on` the neurons whose group is not among those with the largest products; compiled by numba.

    choice: how neurons are chosen (columns as listed in this file); nothing is dropped if as many groups are kept as
    were tried. h: products of activation and up projection, fp32 [K, F] for K tokens and F neurons. on: bool [K, F],
    the choice of `tried`, changed in place: the neurons that stay are multiplied by the down matrix.
    """
    if choice[DECISION] == ZEROS or choice[KEPT] == choice[TRIED]:
        return
    size, apart = choice[SIZE], NEVER if h.shape[0] == 1 else ZERO
    magnitude = np.empty(h.shape[1] // size, np.float32)
    for n in range(h.shape[0]):
        for g in range(len(magnitude)):
            total = ZERO
            for f in range(g * size, (g + 1) * size):
                total += abs(h[n, f])
            magnitude[g] = total if on[n, g * size] else apart
        _spread(magnitude, choice[KEPT], size, on[n])


@compiled
def _spread(score: Array, count: int, size: int, on: Array) -> None:
    """Mark the neurons of the `count` groups with the largest scores."""
    groups = np.zeros(len(score), np.bool_)
    _mark(score, count, groups)
    for g in range(len(score)):
        for f in range(g * size, (g + 1) * size):
            on[f] = groups[g]


@compiled
def fill(x: Array, part: Array, value: float) -> None:
    """Set columns of x to a number, for all tokens; compiled by numba.

    x: [K, F]. part: the first column and the one after the last. value: the number.
    """
    for n in range(x.shape[0]):
        for f in range(part[0], part[1]):
            x[n, f] = value


@compiled
def needed(on: Array, rows: Array) -> int:
    """Write the indices of the neurons that at least one token needs to `rows`, ascending, and return their number.

    Compiled by numba. on: bool [K, F], the neurons that each of K tokens needs. rows: int64 [F].
    """
    count = 0
    for f in range(on.shape[1]):
        some = on[0, f]
        for n in range(1, on.shape[0]):
            some |= on[n, f]
        rows[count] = f
        count += some
    return count


@compiled
def or_all(count: int, rows: Array) -> int:
    """Return how many neurons' weights to read: `count`, or all if reading all of them is less work than picking.

    Compiled by numba. count: number of neurons that some token needs. rows: their indices come first; if all neurons
    are to be read, their indices 0, 1, 2, ... are written here.
    """
    if np.float32(count) <= WORTH * np.float32(len(rows)):
        return count
    for f in range(len(rows)):
        rows[f] = f
    return len(rows)


@compiled
def note(said: Array, choice: Array, tokens: Array, sizes: Array, on: Array, scores: Array, which: int) -> None:
    """Write the scores of neuron groups, and which groups are on, into the tables that become the caller's records.

    Compiled by numba. said: addresses of the tables of scores (0 means that no records are wanted) and of marks, index
    of the block, and number of blocks. choice: how neurons are chosen. tokens: indices of the K tokens in the call.
    sizes: number of the call's tokens and of neurons. on: bool [K, F]. scores: fp32 [K, G]. which: 0 for the groups
    that are tried, 1 for those that are kept.
    """
    (scores_at, marks_at, block, blocks), (T, F), (K, G) = said, sizes, scores.shape
    if not scores_at:
        return
    score = _lying(scores_at + 4 * block * T * F, (T, G), ONE)
    mark = _lying(marks_at + (which * blocks + block) * T * F, (T, G), np.uint8(0))
    for n in range(K):
        for g in range(G):
            score[tokens[n], g] = scores[n, g]
            mark[tokens[n], g] = on[n, g * choice[SIZE]]


@compiled
def multiplied(matrix: Array, x_at: int, places: Array, width: int, rows: Array, a: Array, on: Array, h: Array) -> None:
    """Compute h = a * (weight x) for the listed neurons, and 0 where a token does not need one; compiled by numba.

    matrix: the up matrix, as for `product`. x_at: address of the fp32 tokens [K, width]. places: addresses, of which
    the second and third hold the tokens rounded to int16 and their factors. width: number of inputs. rows: indices of
    the neurons. a: activations [K, F]. on: bool [K, F], the neurons that each token needs. h: [K, F], where the result
    is written; columns of other neurons are left as they are.
    """
    K, F = a.shape
    if matrix[1]:
        _multiplied_int8(matrix, places, width, rows, h)
    else:
        _multiplied_single(_lying(matrix[0], (F, width), ONE), _lying(x_at, (K, width), ONE), rows, h)
    for n in range(K):
        for f in rows:
            h[n, f] = h[n, f] * a[n, f] if on[n, f] else ZERO


@compiled
def _multiplied_single(weight: Array, x: Array, rows: Array, h: Array) -> None:
    """Multiply four fp32 rows at a time; the last ones are repeated, so that each product is computed alike."""
    (K, width), count = x.shape, len(rows)
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
        single_rows(weight, x, h, rows[j], rows[j] + 1)


@compiled
def _multiplied_int8(matrix: Array, places: Array, width: int, rows: Array, h: Array) -> None:
    """Multiply int8 rows with tokens rounded to int16, while those after the next are asked for."""
    weight_at, scale_at, scales, (_, x_at, unit_at) = matrix[0], matrix[1], matrix[3], places
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


@compiled
def summed(
    matrix: Array, h_at: int, places: Array, sizes: Array, rows: Array, y_at: int, first: int, last: int
) -> None:
    """Multiply the listed neurons by the down matrix, for the outputs from `first` to `last` - 1; compiled by numba.

    matrix: the down matrix, whose weight lies neuron by neuron, [F, D], and its scales as [M, D]. h_at: address of the
    products [K, F]. places: as for `product`. sizes: K, F and D. rows: indices of the neurons. y_at: address of the
    outputs [K, D]. first, last: multiples of 16, or D.
    """
    K, _F, D = sizes
    y = _lying(y_at, (K, D), ONE)
    fill(y, (first, last), ZERO)
    if last <= first:
        return
    if matrix[1]:
        _summed_int8(matrix, places, sizes, rows, y, first, last)
    else:
        _summed_single(matrix[0], h_at, sizes, rows, y, first, last)


@compiled
def _summed_single(weight_at: int, h_at: int, sizes: Array, rows: Array, y: Array, first: int, last: int) -> None:
    (K, F, D), count = sizes, len(rows)
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


@compiled
def _ask(weight_at: int, where: Array, count: int, cursor: Array, part: Array, size: int) -> Array:
    """Ask for so many more bytes of a part of each row, in the order of memory; return the new cursor.

    cursor: a place in the list of rows, and a byte of that row. Asked for in the order of use, a part of each row after
    the other, memory is a third slower.
    """
    row, byte = cursor
    for _ in range(-(-size // LINE)):
        if row < count:
            fetch(weight_at + where[row] + byte, 1)
            byte += LINE
            if byte >= part[1]:
                row, byte = row + 1, part[0]
    return row, byte


@compiled
def _summed_int8(matrix: Array, places: Array, sizes: Array, rows: Array, y: Array, first: int, last: int) -> None:
    """Sum the rows of 64 neurons that share scales as integers, and add these sums in fp32."""
    (K, F, D), (weight_at, scale_at, scales) = sizes, (matrix[0], matrix[1], matrix[3])
    x, unit = _lying(places[1], (K, F), np.int16(0)), _lying(places[2], (K,), ONE)
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


@compiled
def _paired(rows: Array, x: Array, pitch: int, where: Array, factor: Array, ends: Array) -> None:
    """List the places of rows in bytes, in pairs of the same group, and pairs of factors of each token.

    Where a group has an odd number, its last row is repeated with a factor of 0. ends [M]: pairs up to each group's
    end.
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


@compiled
def _added(given: Array, where: Array, factor: Array, sums: Array, first: int, last: int, cursor: Array) -> Array:
    """Add some pairs of rows to the integer sums [K, D] of all tokens; return the cursor of `_ask`."""
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


@compiled
def part_of_list(count: int, part: int, parts: int) -> Array:
    """Return the first index of one thread's part of a list and the index after its last one; compiled by numba.

    count: length of the list. part, parts: index and number of threads.
    """
    each = -(-count // parts)
    return min(part * each, count), min((part + 1) * each, count)
