"""The operations of `decode_step`, compiled by numba for this processor.

Tensors are passed by address, because making numpy arrays of them takes longer than the work.

Shape letters: N rows, D width, C columns of the cache, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.heads_dot import HALF, KEYS, MOST_HEADS, SINGLE, add_values, scores, store_half
from skipstone.ops.kept_code import kept_njit
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import FAST, inner

compiled = kept_njit(fastmath=FAST, nogil=True, error_model="numpy")  # kept on disk
ONE = np.float32(0)  # a number of the kind to read
INFINITY = np.float32(np.inf)
LANES = 16  # numbers of a vector, at most

# exp(x) = 2^k e^r with |r| <= ln(2) / 2; numba's own exp is not vectorised
LOWEST, LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(x) for x in (-87.0, 1.44269504, 0.693145752, 1.42860677e-6))
SERIES = tuple(np.float32(1 / x) for x in (1, 1, 2, 6, 24, 120, 720))


@compiled
def rms_norm(x_at: int, weight_at: int, y_at: int, rows: int, width: int, eps: float) -> None:
    """Normalise x [rows, width] into y by root mean square; compiled by numba.

    x_at, weight_at, y_at: addresses of fp32 numbers. rows, width: the shape. eps: added to the mean square.
    """
    x, y, weight = _lying(x_at, (rows, width), ONE), _lying(y_at, (rows, width), ONE), _lying(weight_at, (width,), ONE)
    for n in range(rows):
        total = np.float32(0)
        for d in range(width):
            total += x[n, d] * x[n, d]
        factor = np.float32(1 / np.sqrt(total / np.float32(width) + np.float32(eps)))
        for d in range(width):
            y[n, d] = x[n, d] * factor * weight[d]


@compiled
def attend_newest(addresses: Array, sizes: Array, scaling: float) -> None:
    """Rotate one token's query and key, store key, value and index in the row (slot), and attend to all stored keys.

    Compiled by numba. addresses: the addresses of query [H, E], key and value [G, E], cos, sin [E] (0 means no
    rotation), slot, stored keys and values [C, G, E], stored slots [C], and output [H, E]; slots are int64, all others
    fp32, and stored keys and values fp32 or fp16. sizes: H query heads, G key/value heads, head size E, columns C of
    the store, the column to write, and the bytes of a stored number; this column and all before it are read. scaling:
    factor on scores.
    """
    q_at, k_at, v_at, cos_at, sin_at, slot_at, keys_at, values_at, slots_at, y_at = addresses
    H, G, E, C, column, size = sizes
    _lying(slots_at, (C,), 0)[column] = _lying(slot_at, (1,), 0)[0]
    query, key = np.empty((H, E), np.float32), np.empty((G, E), np.float32)
    _rotate(_lying(q_at, (H, E), ONE), cos_at, sin_at, query)
    _rotate(_lying(k_at, (G, E), ONE), cos_at, sin_at, key)
    step = size * G * E
    for g in range(G):
        store(key[g], keys_at + column * step + size * g * E, size)
        store(_lying(v_at + SINGLE * g * E, (E,), ONE), values_at + column * step + size * g * E, size)
    stored, out = (keys_at, values_at, step, size), _lying(y_at, (H, E), ONE)
    attend_heads(query, (H // G, 0), stored, column + 1, np.float32(scaling), out)


@inner
def store(x: Array, at: int, size: int) -> None:
    """Store the fp32 numbers of x at the address `at`, as they are or in fp16 (`store_half`); compiled by numba.

    size: bytes of a stored number, 4 or 2.
    """
    if size == HALF:
        for e in range(len(x)):
            store_half(at + HALF * e, x[e])
    else:
        stored = _lying(at, (len(x),), ONE)
        for e in range(len(x)):
            stored[e] = x[e]


@inner
def _rotate(x: Array, cos_at: int, sin_at: int, out: Array) -> None:
    """Apply rotary position embedding to the rows of x [H, E], or copy them, and write the result to `out`.

    cos_at, sin_at: addresses of the token's cosines and sines [E]; the first half of the sines is already negated. With
    cos_at 0, rows are copied.
    """
    width = x.shape[1]
    half = width // 2
    for h in range(x.shape[0]):
        if cos_at:
            cos, sin = _lying(cos_at, (width,), ONE), _lying(sin_at, (width,), ONE)
            for e in range(half):
                a, b = x[h, e], x[h, e + half]
                out[h, e] = a * cos[e] + b * sin[e]
                out[h, e + half] = b * cos[e + half] + a * sin[e + half]
        else:
            for e in range(width):
                out[h, e] = x[h, e]


@inner
def attend_heads(query: Array, groups: Array, stored: Array, count: int, scaling: Array, out: Array) -> None:
    """Attend with some query heads of a token to `count` keys, and write the weighted values to `out` [H, E].

    Compiled by numba. Keys and values are read from the first to the last, a few at a time by all heads, as the
    processor reads memory fastest. query: fp32 [H, E] for H heads of size E, multiplied in place by `scaling`, the
    factor on the scores. groups: two numbers, how many query heads form a group that shares keys and values, and the
    place of the first head of `query` in its group, from 0. stored: the addresses of the first key and value of the
    first head's group, the bytes from one key or value to the next, and the bytes of a number, 4 for fp32 and 2 for
    fp16.
    """
    (heads, width), (key_at, value_at, step, size) = query.shape, stored
    weight = np.empty((heads, count), np.float32)
    for h in range(heads):
        for e in range(width):
            query[h, e] *= scaling
            out[h, e] = 0
    _read_all(False, query, groups, (key_at, step, size), weight)
    for h in range(heads):
        _softmax(weight[h])
    _read_all(True, out, groups, (value_at, step, size), weight)


@inner
def _read_all(adds: bool, x: Array, groups: Array, stored: Array, weight: Array) -> None:
    """Write the inner products of x [H, E] with all keys to `weight` [H, C], or add the values times weights to x.

    adds: whether it is the second. groups: as in `attend_heads`. stored: the address of the first key or value of the
    first head's group, the bytes from one to the next, and the bytes of a number.
    """
    (heads, width), (sharing, before), (at, step, size), count = x.shape, groups, stored, weight.shape[1]
    x_at, weight_at, row = x.ctypes.data, weight.ctypes.data, SINGLE * count
    for c in range(0, count, KEYS):
        h, some = 0, min(KEYS, count - c)
        while h < heads:
            group = (before + h) // sharing
            together = min(heads - h, (group + 1) * sharing - before - h, MOST_HEADS)
            here = (at + c * step + size * group * width, step, size)
            places = (x_at + SINGLE * h * width, weight_at + h * row + SINGLE * c, row)
            if adds:
                add_values(together, some, width, here, places)
            else:
                scores(together, some, width, here, places)
            h += together


@inner
def _softmax(x: Array) -> None:
    """Replace x by its softmax; numba finds a maximum of 16 numbers at once only if it is written so."""
    most, largest, total, whole = np.full(LANES, -INFINITY), -INFINITY, np.float32(0), len(x) - len(x) % LANES
    for c in range(0, whole, LANES):
        for i in range(LANES):
            most[i] = max(most[i], x[c + i])
    for i in range(LANES):
        largest = max(largest, most[i])
    for c in range(whole, len(x)):
        largest = max(largest, x[c])
    for c in range(len(x)):
        x[c] = _exp(x[c] - largest)
    for c in range(len(x)):
        total += x[c]
    factor = np.float32(1) / total
    for c in range(len(x)):
        x[c] *= factor


@inner
def _exp(x: Array) -> Array:
    """Return e^x for x <= 0, with a relative error of about 2e-7."""
    low = max(x, LOWEST)
    power = np.float32(np.rint(low * LOG2_E))
    rest = low - power * LN2_HIGH - power * LN2_LOW
    a0, a1, a2, a3, a4, a5, a6 = SERIES
    y = a0 + rest * (a1 + rest * (a2 + rest * (a3 + rest * (a4 + rest * (a5 + rest * a6)))))
    scale = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return y * scale if x == x else x  # NaN stays
