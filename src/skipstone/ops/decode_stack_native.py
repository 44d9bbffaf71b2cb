"""All blocks of a plain decoder for a few tokens of one row, compiled by numba to one call.

Weights are read as they are stored, fp32 or int8, and once for all tokens. Several threads share the rows of every
matrix; they wait for each other five times a block. Norms and roundings, which take no time, are repeated by each.

Shape letters: L blocks, T tokens, D width, F neurons, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.decode_step_native import ONE, _attend, _exp, _rotate, compiled
from skipstone.ops.int8_native import grouped_rows, round_tokens
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import BARRIER, doubles, integers, part_of, parts_of, team, wait
from skipstone.ops.workers import share as share
from skipstone.ops.workers import threads as threads

# Columns of the table of a block: addresses of norms (0: none); then of each matrix the addresses of weight, scale
# (0: fp32 weights) and bias (0: none), and the number of scales of a row.
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "query", "key")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BEFORE_A, AFTER_A, BEFORE_M, AFTER_M, OF_QUERY, OF_KEY = range(6)
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(6, 34, 4)
COLUMNS = 34
# Columns of the memory of a block: addresses of stored keys, values, slots, and of cos and sin (0: not rotated).
MEMORY = 5
FUNCTIONS = ("silu", "gelu_tanh", "relu")
SLOPE, CUBE, ZERO = np.float32(1.5957691216), np.float32(0.044715), np.float32(0)  # 2 sqrt(2 / pi)


@compiled
def run(addresses: Array, sizes: Array, numbers: Array, part: int, parts: int, barrier: int) -> None:
    """Add the updates of all blocks to the stream x [T, D], for the part `part` of the rows of all matrices."""
    table_at, memory_at, slot_at, x_at, work_at = addresses
    L, T, D, F, H, G, E, column, function = sizes
    eps, offset, _scaling = numbers
    table, memory = _lying(table_at, (L, COLUMNS), 0), _lying(memory_at, (L, MEMORY), 0)
    x = _lying(x_at, (T, D), ONE)
    q_at = work_at
    k_at = q_at + 4 * T * H * E
    v_at = k_at + 4 * T * G * E
    a_at = v_at + 4 * T * G * E
    y_at = a_at + 4 * T * H * E
    g_at = y_at + 4 * T * D
    u_at = g_at + 4 * T * F
    y, arrivals = _lying(y_at, (T, D), ONE), 0
    own = u_at + 4 * T * F + part * private(T, max(D, F, H * E))
    places = (own, own + 4 * T * max(D, F, H * E), own + 6 * T * max(D, F, H * E))
    for block in range(L):
        row = table[block]
        _norm(x, row[BEFORE_A], eps, offset, places[0])
        _rounded(row[QUERY + 1] + row[KEY + 1] + row[VALUE + 1], places[0], places, T, D)
        _product(row[QUERY : QUERY + 4], (T, H * E, D), places[0], places, q_at, part, parts)
        _product(row[KEY : KEY + 4], (T, G * E, D), places[0], places, k_at, part, parts)
        _product(row[VALUE : VALUE + 4], (T, G * E, D), places[0], places, v_at, part, parts)
        arrivals = _together(parts, barrier, arrivals)
        _attention(row, memory[block], (q_at, k_at, v_at, slot_at, a_at), (T, H, G, E, column), numbers, part, parts)
        arrivals = _together(parts, barrier, arrivals)
        _rounded(row[OUT + 1], a_at, places, T, H * E)
        _product(row[OUT : OUT + 4], (T, D, H * E), a_at, places, y_at, part, parts)
        arrivals = _added(x, y, row[AFTER_A], numbers, part, parts, barrier, arrivals)
        _norm(x, row[BEFORE_M], eps, offset, places[0])
        _rounded(row[GATE + 1] + row[UP + 1], places[0], places, T, D)
        _product(row[GATE : GATE + 4], (T, F, D), places[0], places, g_at, part, parts)
        _product(row[UP : UP + 4], (T, F, D), places[0], places, u_at, part, parts)
        _gated(_lying(g_at, (T, F), ONE), _lying(u_at, (T, F), ONE), function, part, parts)
        arrivals = _together(parts, barrier, arrivals)
        _rounded(row[DOWN + 1], g_at, places, T, F)
        _product(row[DOWN : DOWN + 4], (T, D, F), g_at, places, y_at, part, parts)
        arrivals = _added(x, y, row[AFTER_M], numbers, part, parts, barrier, arrivals)


@compiled
def private(tokens: int, widest: int) -> int:
    """Return the bytes that each thread has for itself: normed and rounded tokens, and a number of each."""
    return (6 * tokens * widest + 4 * tokens + 127) // 64 * 64


@compiled
def _together(parts: int, barrier: int, arrivals: int) -> int:
    """Wait for the other threads; return the arrivals that end the next wait."""
    if parts > 1:
        wait(barrier, arrivals + parts)
    return arrivals + parts


@compiled
def _share(rows: int, part: int, parts: int) -> Array:
    """Return the first row of a part and the one after its last."""
    each = -(-rows // (16 * parts)) * 16
    return min(part * each, rows), min((part + 1) * each, rows)


@compiled
def _norm(x: Array, weight_at: int, eps: float, offset: float, out_at: int) -> None:
    """Normalise x [T, D] by root mean square, or copy it."""
    out = _lying(out_at, x.shape, ONE)
    for n in range(x.shape[0]):
        _norm_row(x[n], weight_at, eps, offset, out[n])


@compiled
def _norm_row(x: Array, weight_at: int, eps: float, offset: float, out: Array) -> None:
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
def _rounded(wanted: int, x_at: int, places: Array, tokens: int, width: int) -> None:
    """Round tokens for products with int8 weights."""
    if wanted:
        round_tokens((x_at, places[1], places[2]), (tokens, 0, width, 0))


@compiled
def _product(matrix: Array, sizes: Array, x_at: int, places: Array, y_at: int, part: int, parts: int) -> None:
    """Compute a part of the outputs of one matrix, given by its four columns. sizes: tokens, outputs, inputs."""
    weight_at, scale_at, bias_at, scales = matrix[0], matrix[1], matrix[2], matrix[3]
    tokens, outputs, inputs = sizes
    first, last = _share(outputs, part, parts)
    if scale_at:
        addresses = (weight_at, scale_at, x_at, y_at, places[1], places[2])
        grouped_rows(addresses, (tokens, outputs, inputs, scales), first, last)
    else:
        weight, x = _lying(weight_at, (outputs, inputs), ONE), _lying(x_at, (tokens, inputs), ONE)
        _single_rows(weight, x, _lying(y_at, (tokens, outputs), ONE), first, last)
    if bias_at:
        bias, y = _lying(bias_at, (outputs,), ONE), _lying(y_at, (tokens, outputs), ONE)
        for n in range(tokens):
            for o in range(first, last):
                y[n, o] += bias[o]


@compiled
def _single_rows(weight: Array, x: Array, y: Array, first: int, last: int) -> None:
    """Multiply fp32 rows with up to four tokens at a time."""
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
def _attention(
    row: Array, memory: Array, addresses: Array, sizes: Array, numbers: Array, part: int, parts: int
) -> None:
    """Norm, rotate, store and attend, for every `parts`-th key/value head."""
    q_at, k_at, v_at, slot_at, a_at = addresses
    T, H, G, E, column = sizes
    eps, offset, scaling = numbers
    each, end = H // G, column + T
    query, out = _lying(q_at, (T, H, E), ONE), _lying(a_at, (T, H, E), ONE)
    key, value = _lying(k_at, (T, G, E), ONE), _lying(v_at, (T, G, E), ONE)
    keys, values = _lying(memory[0], (end, G, E), ONE), _lying(memory[1], (end, G, E), ONE)
    if part == 0:
        slots, slot = _lying(memory[2], (end,), 0), _lying(slot_at, (T,), 0)
        for n in range(T):
            slots[column + n] = slot[n]
    for g in range(part, G, parts):
        for n in range(T):
            cos_at = memory[3] + 4 * n * E if memory[3] else 0
            sin_at = memory[4] + 4 * n * E if memory[4] else 0
            if row[OF_KEY]:
                _norm_row(key[n, g], row[OF_KEY], eps, offset, key[n, g])
            _rotate(key[n, g : g + 1], cos_at, sin_at, keys[column + n, g : g + 1])
            for e in range(E):
                values[column + n, g, e] = value[n, g, e]
            turned = np.empty((each, E), np.float32)
            for h in range(each):
                if row[OF_QUERY]:
                    _norm_row(query[n, g * each + h], row[OF_QUERY], eps, offset, query[n, g * each + h])
            _rotate(query[n, g * each : (g + 1) * each], cos_at, sin_at, turned)
            _attend(
                turned,
                keys[:, g : g + 1],
                values[:, g : g + 1],
                column + n + 1,
                np.float32(scaling),
                out[n, g * each : (g + 1) * each],
            )


@compiled
def _added(x: Array, y: Array, norm_at: int, numbers: Array, part: int, parts: int, barrier: int, arrivals: int) -> int:
    """Add the update y to the stream; a norm of the update needs all of it, and only one thread computes it."""
    if norm_at:
        arrivals = _together(parts, barrier, arrivals)
        if part == 0:
            for n in range(x.shape[0]):
                _norm_row(y[n], norm_at, numbers[0], numbers[1], y[n])
                for d in range(x.shape[1]):
                    x[n, d] += y[n, d]
    else:
        first, last = _share(x.shape[1], part, parts)
        for n in range(x.shape[0]):
            for d in range(first, last):
                x[n, d] += y[n, d]
    return _together(parts, barrier, arrivals)


@compiled
def _gated(gate: Array, up: Array, function: int, part: int, parts: int) -> None:
    """Compute gate = function(gate) * up for a part of the neurons."""
    first, last = _share(gate.shape[1], part, parts)
    for n in range(gate.shape[0]):
        if function == 2:
            for f in range(first, last):
                gate[n, f] = max(gate[n, f], ZERO) * up[n, f] if gate[n, f] == gate[n, f] else gate[n, f]
        elif function == 1:
            for f in range(first, last):
                a = gate[n, f]
                gate[n, f] = a * _sigmoid(SLOPE * (a + CUBE * a * a * a)) * up[n, f]
        else:
            for f in range(first, last):
                gate[n, f] = gate[n, f] * _sigmoid(gate[n, f]) * up[n, f]


@compiled
def _sigmoid(x: Array) -> Array:
    small = _exp(-abs(x))
    return (np.float32(1) if x >= 0 else small) / (np.float32(1) + small)


@team
def crew(packet: int) -> None:
    """Run a part of it, with the arguments of a packet."""
    given = (integers(packet, 0, 5), integers(packet, 5, 9), doubles(packet, 14, 3))
    run(*given, part_of(packet), parts_of(packet), packet + BARRIER)
