"""The operations of `decode_step`, compiled by numba for this processor.

Tensors are passed by address, because making numpy arrays of them takes longer than the work.

Shape letters: N rows, D width, C columns of the cache, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from skipstone.ops.magnitude_native import Array, _lying

# Sums may be reordered, but NaN and infinities are respected. Compiled code is cached on disk.
compiled = njit(fastmath={"reassoc", "contract", "nsz"}, nogil=True, cache=True, error_model="numpy")
ONE = np.float32(0)  # a number of the kind to read
INFINITY = np.float32(np.inf)

# exp(x) = 2^k e^r with |r| <= ln(2) / 2; numba's own exp is not vectorised
LOWEST, LOG2_E, LN2_HIGH, LN2_LOW = (np.float32(x) for x in (-87.0, 1.44269504, 0.693145752, 1.42860677e-6))
SERIES = tuple(np.float32(1 / x) for x in (1, 1, 2, 6, 24, 120, 720))


@compiled
def rms_norm(x_at: int, weight_at: int, y_at: int, rows: int, width: int, eps: float) -> None:
    """Normalise x [rows, width] into y by root mean square; all are passed by address."""
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
    """Store and attend for one token as in `decode_step.attend_newest`, on addresses."""
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
    _attend(turned, key, value, column + 1, np.float32(scaling), _lying(y_at, (H, E), ONE))


@compiled
def _rotate(x: Array, cos_at: int, sin_at: int, out: Array) -> None:
    """Apply rotary embedding to rows [H, E], or copy them; the first half of sin is negated."""
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


@compiled
def _attend(query: Array, key: Array, value: Array, count: int, scaling: Array, out: Array) -> None:
    """Attend to the first `count` keys, one query head after the other."""
    each, width = query.shape[0] // key.shape[1], query.shape[1]
    weight = np.empty(count, np.float32)
    for h in range(query.shape[0]):
        g, most, total = h // each, -INFINITY, np.float32(0)
        for c in range(count):
            dot = np.float32(0)
            for e in range(width):
                dot += query[h, e] * key[c, g, e]
            weight[c] = dot * scaling
            most = max(most, weight[c])
        for c in range(count):
            weight[c] = _exp(weight[c] - most)
            total += weight[c]
        for e in range(width):
            out[h, e] = 0
        for c in range(count):
            share = weight[c] / total
            for e in range(width):
                out[h, e] += share * value[c, g, e]


@compiled
def _exp(x: Array) -> Array:
    """Return e^x for x <= 0, with a relative error of about 2e-7."""
    low = max(x, LOWEST)
    power = np.float32(np.rint(low * LOG2_E))
    rest = low - power * LN2_HIGH - power * LN2_LOW
    a0, a1, a2, a3, a4, a5, a6 = SERIES
    y = a0 + rest * (a1 + rest * (a2 + rest * (a3 + rest * (a4 + rest * (a5 + rest * a6)))))
    scale = np.int32((np.int32(power) + np.int32(127)) << np.int32(23)).view(np.float32)
    return y * scale if x == x else x  # NaN stays
