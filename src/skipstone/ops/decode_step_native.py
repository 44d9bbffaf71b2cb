"""The operations of `decode_step`, compiled by numba for this processor.

Tensors are passed by address, because making numpy arrays of them takes longer than the work.

Shape letters: N rows, D width, C columns of the cache, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.kept_code import kept_njit
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import FAST, inner

compiled = kept_njit(fastmath=FAST, nogil=True, error_model="numpy")  # kept on disk
ONE = np.float32(0)  # a number of the kind to read
INFINITY = np.float32(np.inf)
TILE = 32  # keys that all heads read before the next ones

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
    fp32. sizes: H query heads, G key/value heads, head size E, columns C of the store, and the column to write; this
    column and all before it are read. scaling: factor on scores.
    """
    q_at, k_at, v_at, cos_at, sin_at, slot_at, keys_at, values_at, slots_at, y_at = addresses
    H, G, E, C, column = sizes
    key, value, new = _lying(keys_at, (C, G, E), ONE), _lying(values_at, (C, G, E), ONE), _lying(v_at, (G, E), ONE)
    _lying(slots_at, (C,), 0)[column] = _lying(slot_at, (1,), 0)[0]
    turned = np.empty((H, E), np.float32)
    _rotate(_lying(q_at, (H, E), ONE), cos_at, sin_at, turned)
    _rotate(_lying(k_at, (G, E), ONE), cos_at, sin_at, key[column])
    for g in range(G):
        for e in range(E):
            value[column, g, e] = new[g, e]
    each, factor = 4 * (H // G) * E, np.float32(scaling)
    for g in range(G):
        asked = _lying(turned.ctypes.data + g * each, (H // G, E), ONE)
        out = _lying(y_at + g * each, (H // G, E), ONE)
        attend_heads(asked, keys_at + 4 * g * E, values_at + 4 * g * E, 4 * G * E, column + 1, factor, out)


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
def attend_heads(query: Array, key_at: int, value_at: int, step: int, count: int, scaling: Array, out: Array) -> None:
    """Attend with each of some query heads to the same `count` keys, and write the weighted values to `out` [H, E].

    Compiled by numba. Keys and values are read a tile at a time by all heads, so that heads after the first find them
    in the processor's cache. query: fp32 [H, E] for H heads of size E. key_at, value_at: addresses of the first key and
    value [E]. step: bytes from one key or value to the next. scaling: factor on the scores. Rows are given by address
    to tell the compiler that their numbers lie one after the other; otherwise it reads them one by one.
    """
    heads, width = query.shape
    weight = np.empty((heads, count), np.float32)
    for c in range(0, count, TILE):
        for h in range(heads):
            _dots(query[h], key_at + c * step, step, weight[h, c : c + TILE])
    for h in range(heads):
        most, total = -INFINITY, np.float32(0)
        for c in range(count):
            weight[h, c] *= scaling
            most = max(most, weight[h, c])
        for c in range(count):
            weight[h, c] = _exp(weight[h, c] - most)
        for c in range(count):
            total += weight[h, c]
        for c in range(count):
            weight[h, c] /= total
        for e in range(width):
            out[h, e] = 0
    for c in range(0, count, TILE):
        for h in range(heads):
            _add(weight[h, c : c + TILE], value_at + c * step, step, out[h])


@inner
def _dots(x: Array, rows_at: int, step: int, out: Array) -> None:
    """Write the inner product of x with each of `len(out)` rows to `out`, four rows at a time.

    rows_at: address of the first row. step: bytes from one row to the next.
    """
    width, whole = len(x), len(out) - len(out) % 4
    for c in range(0, whole, 4):
        at = rows_at + c * step
        k0, k1 = _row(at, width), _row(at + step, width)
        k2, k3 = _row(at + 2 * step, width), _row(at + 3 * step, width)
        s0 = s1 = s2 = s3 = np.float32(0)
        for e in range(width):
            s0 += x[e] * k0[e]
            s1 += x[e] * k1[e]
            s2 += x[e] * k2[e]
            s3 += x[e] * k3[e]
        out[c], out[c + 1], out[c + 2], out[c + 3] = s0, s1, s2, s3
    for c in range(whole, len(out)):
        total, row = np.float32(0), _row(rows_at + c * step, width)
        for e in range(width):
            total += x[e] * row[e]
        out[c] = total


@inner
def _add(factor: Array, rows_at: int, step: int, out: Array) -> None:
    """Add the sum of factor[c] times row c to `out`, four rows at a time.

    rows_at: address of the first row. step: bytes from one row to the next.
    """
    width, whole = len(out), len(factor) - len(factor) % 4
    for c in range(0, whole, 4):
        at = rows_at + c * step
        v0, v1 = _row(at, width), _row(at + step, width)
        v2, v3 = _row(at + 2 * step, width), _row(at + 3 * step, width)
        a0, a1, a2, a3 = factor[c], factor[c + 1], factor[c + 2], factor[c + 3]
        for e in range(width):
            out[e] += a0 * v0[e] + a1 * v1[e] + a2 * v2[e] + a3 * v3[e]
    for c in range(whole, len(factor)):
        a, row = factor[c], _row(rows_at + c * step, width)
        for e in range(width):
            out[e] += a * row[e]


@inner
def _row(at: int, width: int) -> Array:
    return _lying(at, (width,), ONE)


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
