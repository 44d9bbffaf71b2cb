"""Matrix products, norms and the division of work among threads in a decoding step that is one compiled call.

Several threads share the rows of every matrix and wait for each other; norms and roundings, which take no time, are
repeated by each.

Shape letters: T tokens of the call, K of these tokens, D width, O outputs, I inputs.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.decode_frame import (
    ARRIVALS,
    BARRIER,
    COLUMNS,
    FRAME,
    INT4,
    INT8,
    NORMED,
    NUMBERS,
    PART,
    PARTS,
    ROUNDED,
    ROUNDS,
    ROW,
    SINGLE,
    STREAM,
    TOKENS,
    UNIT,
    WIDTH,
)
from skipstone.ops.decode_step_native import ONE, _exp
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.neuron_sums import fetch
from skipstone.ops.single_dot import FLOAT32, STEP, four_floats, one_float, two_floats
from skipstone.ops.workers import call, inner, unit, wait

ZERO = np.float32(0)
WIDE = 1024  # inputs of four tokens, 16 KB, that leave room for weights in the processor's first cache
PIECE, ROWS = 512, 16  # inputs that are read at a time where there are more, and rows that are read with them


@inner
def framed(frame_at: int) -> Array:
    """Return a thread's table of addresses and sizes (its frame) from its address, as an int64 array.

    Compiled by numba. frame_at: the address. `decode_frame.py` names the indices of the array.
    """
    return _lying(frame_at, (FRAME,), 0)


@inner
def together(frame: Array) -> None:
    """Wait until all threads have called this function; compiled by numba.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`).
    """
    if frame[PARTS] > 1:
        frame[ARRIVALS] += frame[PARTS]
        wait(frame[BARRIER], frame[ARRIVALS])


@inner
def share_of(rows: int, part: int, parts: int) -> Array:
    """Return the range of rows that one thread computes: its first row and the row after its last; compiled by numba.

    rows: total number of rows; threads get multiples of 16, the last ones what is left. part, parts: index and number
    of threads.
    """
    each = -(-rows // (16 * parts)) * 16
    return min(part * each, rows), min((part + 1) * each, rows)


@inner
def listed(kinds: Array, least: int, out: Array) -> int:
    """Write the indices of the tokens whose kind is at least `least` to `out`, ascending, and return their number.

    Compiled by numba. kinds: for each token ABSENT, GIVES_KEYS or ASKS (gets an update), which ascend in this order.
    least: the smallest kind that is listed.
    """
    count = 0
    for n in range(len(kinds)):
        if kinds[n] >= least:
            out[count] = n
            count += 1
    return count


@inner
def bits(tokens: Array) -> int:
    """Return an integer in which bit n is set for each index n in `tokens`, an integer array; compiled by numba."""
    found = 0
    for token in tokens:
        found |= 1 << token
    return found


@inner
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


@inner
def normed(frame: Array, tokens: Array, weight_at: int) -> None:
    """Normalise tokens of the residual stream by root mean square into the thread's own memory, or copy them.

    Compiled by numba. frame: the thread's int64 array of addresses and sizes (`decode_frame.py`); it holds the address
    of the result, fp32 [K, D] for width D. tokens: indices of the K tokens in the call. weight_at: address of the
    norm's weight [D]; 0 means that the tokens are copied.
    """
    width, numbers = frame[WIDTH], _lying(frame.ctypes.data + 8 * NUMBERS, (3,), np.float64(0))
    x, out = _lying(frame[STREAM], (frame[TOKENS], width), ONE), _lying(frame[NORMED], (len(tokens), width), ONE)
    for j in range(len(tokens)):
        norm_row(x[tokens[j]], weight_at, numbers[0], numbers[1], out[j])


@inner
def rounded(frame: Array, wanted: int, x_at: int, tokens: int, width: int) -> None:
    """Round fp32 tokens to int16 for products with quantised weights, into the thread's own memory; compiled by numba.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`); it holds the addresses of the result and
    of the factors that restore it. wanted: nonzero if any of the weights are quantised; if 0, nothing is done. x_at:
    address of the tokens. tokens: number of tokens. width: numbers per token.
    """
    if wanted:
        call(frame[ROUNDS], (x_at, frame[ROUNDED], frame[UNIT], tokens, width))


@inner
def product(frame: Array, column: int, sizes: Array, x_at: int, y_at: int) -> None:
    """Multiply tokens with one matrix of the block, for the thread's share of its outputs; compiled by numba.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`). column: the index of the matrix's first
    entry in the block's row of `Program.table_LC`, such as `decode_frame.QUERY`. sizes: numbers of tokens, outputs and
    inputs. x_at: address of the fp32 tokens; if the weights are quantised, those that `rounded` has rounded are read
    instead. y_at: address of the result, fp32 [tokens, outputs].
    """
    row, (tokens, outputs, inputs) = _lying(frame[ROW], (COLUMNS,), 0), sizes
    first, last = share_of(outputs, frame[PART], frame[PARTS])
    to, given = frame[SINGLE], x_at
    if row[column + 1]:
        to, given = frame[INT8] if row[column + 3] else frame[INT4], frame[ROUNDED]
    matrix = (row[column], row[column + 1], row[column + 2], row[column + 3])
    call(to, (*matrix, given, frame[UNIT], y_at, tokens, outputs, inputs, first, last))


@inner
def _four_wide(kind: int, weight_at: int, x_at: int, y_at: int, sizes: Array, first: int, last: int) -> None:
    """Multiply the weight's rows `first` to `last` - 1 with four tokens, 512 inputs at a time, into y [4, O].

    This is for tokens so wide that four of them would leave no room for weights in the processor's first cache. Weights
    some rows ahead are prefetched, because rows are not read in the order of memory. kind: dtype of the weights, as in
    `single_rows`. weight_at, x_at, y_at: addresses of the weight [O, I], of the fp32 tokens [4, I] and of the result.
    sizes: O and I. Inputs beyond the last multiple of 32 are left to the caller.
    """
    (outputs, inputs), size, row = sizes, 4 if kind == FLOAT32 else 2, 4 * sizes[1]
    y, whole, pitch = _lying(y_at, (4, outputs), ZERO), inputs - inputs % STEP, size * inputs
    for start in range(first, last, ROWS):
        end = min(start + ROWS, last)
        ahead = weight_at + end * pitch
        for i in range(0, whole, PIECE):
            count = min(PIECE, whole - i)
            for o in range(start, end):
                fetch(ahead, size * count)
                ahead += size * count
                a, b, c, d = four_floats(kind, weight_at + o * pitch + size * i, x_at + 4 * i, row, count // STEP)
                if i:
                    a, b, c, d = y[0, o] + a, y[1, o] + b, y[2, o] + c, y[3, o] + d
                y[0, o], y[1, o], y[2, o], y[3, o] = a, b, c, d


@unit(12)
def single_rows(
    weight_at: int,
    _scale_at: int,
    bias_at: int,
    kind: int,
    x_at: int,
    _unit_at: int,
    y_at: int,
    tokens: int,
    outputs: int,
    inputs: int,
    first: int,
    last: int,
) -> None:
    """Multiply rows `first` to `last` - 1 of a floating-point weight [O, I] with fp32 tokens [K, I] into y [K, O].

    Compiled by numba, for up to four tokens at a time; sums are fp32. weight_at, bias_at, x_at, y_at: addresses of
    weight, bias (0: none), tokens and result. kind: FLOAT32, BFLOAT16 or FLOAT16 (`single_dot.py`), the dtype of the
    weight; for BFLOAT16 and FLOAT16, I has to be a multiple of 32. tokens, outputs, inputs: K, O, I. The other
    arguments are unused: kernels for int8 weights, which can take this one's place, need them.
    """
    x, y = _lying(x_at, (tokens, inputs), ONE), _lying(y_at, (tokens, outputs), ONE)
    steps, row, fours = inputs // STEP, 4 * inputs, tokens - tokens % 4
    pitch = row if kind == FLOAT32 else 2 * inputs
    if inputs <= WIDE:
        fours = 0
    for n in range(0, fours, 4):
        _four_wide(kind, weight_at, x_at + n * row, y_at + 4 * n * outputs, (outputs, inputs), first, last)
    for o in range(first, last):
        at, n = weight_at + o * pitch, fours
        while n + 4 <= tokens:
            a, b, c, d = four_floats(kind, at, x_at + n * row, row, steps)
            y[n, o], y[n + 1, o], y[n + 2, o], y[n + 3, o] = a, b, c, d
            n += 4
        if n + 2 <= tokens:
            e, f = two_floats(kind, at, x_at + n * row, row, steps)
            y[n, o], y[n + 1, o] = e, f
            n += 2
        if n < tokens:
            (g,) = one_float(kind, at, x_at + n * row, row, steps)
            y[n, o] = g
        for n in range(tokens if steps * STEP < inputs else 0):
            weight, rest = _lying(at, (inputs,), ONE), ZERO
            for i in range(steps * STEP, inputs):
                rest += weight[i] * x[n, i]
            y[n, o] += rest
    if bias_at:
        bias = _lying(bias_at, (outputs,), ONE)
        for k in range(tokens):
            for o in range(first, last):
                y[k, o] += bias[o]


@inner
def added(frame: Array, y_at: int, tokens: Array, scale: Array, norm_at: int) -> None:
    """Add an update, scaled for each token, to the residual stream; compiled by numba.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`). y_at: address of the update, fp32 [K, D]
    for width D. tokens: indices of the K tokens in the call. scale: fp32 [K], the factors. norm_at: address of the
    weight of a norm by which the update is first normalised (0: none); then one thread computes all columns, because a
    norm needs all of them.
    """
    part, width = frame[PART], frame[WIDTH]
    x, y = _lying(frame[STREAM], (frame[TOKENS], width), ONE), _lying(y_at, (len(tokens), width), ONE)
    first, last = share_of(width, part, frame[PARTS])
    if norm_at:
        together(frame)
        first, last = (0, width) if part == 0 else (0, 0)
    numbers = _lying(frame.ctypes.data + 8 * NUMBERS, (3,), np.float64(0))
    for j in range(len(tokens)):
        if norm_at and part == 0:
            norm_row(y[j], norm_at, numbers[0], numbers[1], y[j])
        for d in range(first, last):
            x[tokens[j], d] += y[j, d] * scale[j]
    together(frame)


@inner
def sigmoid(x: Array) -> Array:
    """Return 1 / (1 + e^-x) in fp32; compiled by numba."""
    small = _exp(-abs(x))
    return (np.float32(1) if x >= 0 else small) / (np.float32(1) + small)
