"""A block's attention in the decoding step that runs all blocks as one compiled call (`decode_stack_native.py`).

Shape letters: T tokens of the call, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_frame as of
from skipstone.ops.decode_products_native import added, framed, listed, norm_row, normed, product, rounded, together
from skipstone.ops.decode_step_native import ONE, _attend, _rotate
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import call, inner, unit


@unit(1)
def attention(frame_at: int) -> None:
    """Compute the current block's attention and add it to the residual stream; compiled by numba.

    Keys and values are stored for the tokens that reach the attention, and their number is returned to the caller
    (`Ran.stored`); only tokens that get an update have queries. frame_at: address of the thread's frame, its int64
    array of addresses and sizes (`decode_frame.py`), which names the block and says which tokens these are.
    """
    frame = framed(frame_at)
    T, D, H, G, E = frame[of.TOKENS], frame[of.WIDTH], frame[of.HEADS], frame[of.GROUPS], frame[of.HEAD_SIZE]
    row = _lying(frame[of.ROW], (of.COLUMNS,), 0)
    kind = _lying(frame_at + 8 * of.KINDS, (of.SCOPES, T), 0)[of.OF_ATTENTION]
    there, asking = _lying(frame_at + 8 * of.THERE, (T,), 0), _lying(frame_at + 8 * of.ASKING, (T,), 0)
    given, count = listed(kind, of.GIVES_KEYS, there), listed(kind, of.ASKS, asking)
    _lying(frame[of.STORED], (frame[of.BLOCKS], 3), 0)[frame[of.INDEX], 0] = given
    if not given:
        return
    there, asking = there[:given], asking[:count]
    normed(frame, there, row[of.BEFORE_A])
    x_at = frame[of.NORMED]
    rounded(frame, row[of.QUERY + 1] + row[of.KEY + 1] + row[of.VALUE + 1], x_at, given, D)
    product(frame, of.KEY, (given, G * E, D), x_at, frame[of.K_AT])
    product(frame, of.VALUE, (given, G * E, D), x_at, frame[of.V_AT])
    if count:
        if count < given:
            normed(frame, asking, row[of.BEFORE_A])
            rounded(frame, row[of.QUERY + 1], x_at, count, D)
        product(frame, of.QUERY, (count, H * E, D), x_at, frame[of.Q_AT])
    together(frame)
    call(frame[of.TURN], (frame_at, given, count))
    together(frame)
    call(frame[of.ATTEND], (frame_at, given, count))
    together(frame)
    if not count:
        return
    rounded(frame, row[of.OUT + 1], frame[of.A_AT], count, H * E)
    product(frame, of.OUT, (count, D, H * E), frame[of.A_AT], frame[of.Y_AT])
    gain = _lying(frame_at + 8 * of.GAINS, (of.SCOPES, T), ONE)
    factor = _lying(frame_at + 8 * of.FACTORS, (of.SCOPES, T), ONE)
    scale = _lying(frame_at + 8 * of.SCALES, (count,), ONE)
    for j in range(count):
        scale[j] = gain[of.OF_ATTENTION, asking[j]] * factor[of.OF_ATTENTION, asking[j]]
    added(frame, frame[of.Y_AT], asking, scale, row[of.AFTER_A])


@unit(3)
def turn(frame_at: int, given: int, count: int) -> None:
    """Normalise and rotate queries and keys, and store keys, values and the tokens' indices in the row in the cache.

    Compiled by numba. Norms are applied if the block has them (QK-norm). Of P threads, thread p computes heads p, p +
    P, p + 2P and so on. frame_at: address of the thread's frame, its int64 array of addresses and sizes
    (`decode_frame.py`). given: number of tokens with keys and values. count: number of tokens with queries.
    """
    frame = framed(frame_at)
    there, asking = _lying(frame_at + 8 * of.THERE, (given,), 0), _lying(frame_at + 8 * of.ASKING, (count,), 0)
    H, G, E, part, parts = frame[of.HEADS], frame[of.GROUPS], frame[of.HEAD_SIZE], frame[of.PART], frame[of.PARTS]
    row, memory = _lying(frame[of.ROW], (of.COLUMNS,), 0), _lying(frame[of.OWN_MEMORY], (of.MEMORY,), 0)
    numbers, slots = _lying(frame.ctypes.data + 8 * of.NUMBERS, (3,), np.float64(0)), _lying(frame[of.SLOT], (8,), 0)
    column, K = memory[of.COLUMN], len(there)
    query = _lying(frame[of.Q_AT], (len(asking), H, E), ONE)
    key, value = _lying(frame[of.K_AT], (K, G, E), ONE), _lying(frame[of.V_AT], (K, G, E), ONE)
    keys, values = _lying(memory[of.KEYS], (column + K, G, E), ONE), _lying(memory[of.VALUES], (column + K, G, E), ONE)
    stored = _lying(memory[of.SLOTS], (column + K,), 0)
    for j in range(K):
        cos_at, sin_at = _angles(memory, there[j], E)
        if part == 0:
            stored[column + j] = slots[there[j]]
        for g in range(part, G, parts):
            if row[of.OF_KEY]:
                norm_row(key[j, g], row[of.OF_KEY], numbers[0], numbers[1], key[j, g])
            _rotate(key[j, g : g + 1], cos_at, sin_at, keys[column + j, g : g + 1])
            for e in range(E):
                values[column + j, g, e] = value[j, g, e]
    for j in range(len(asking)):
        cos_at, sin_at = _angles(memory, asking[j], E)
        for h in range(part, H, parts):
            if row[of.OF_QUERY]:
                norm_row(query[j, h], row[of.OF_QUERY], numbers[0], numbers[1], query[j, h])
            if cos_at:
                _rotate(query[j, h : h + 1], cos_at, sin_at, query[j, h : h + 1])


@inner
def _angles(memory: Array, token: int, width: int) -> Array:
    """Return the addresses of a token's cos and sin of the rotary angles; 0 and 0 if the block does not rotate.

    memory: the block's row in the table of caches. token: index of the token in the call. width: numbers per token, E.
    """
    if memory[of.COS]:
        return memory[of.COS] + 4 * token * width, memory[of.SIN] + 4 * token * width
    return 0, 0


@unit(3)
def attend(frame_at: int, given: int, count: int) -> None:
    """Compute the attention of this thread's share of all pairs of a token and a query head; compiled by numba.

    Of P threads, thread p computes every P-th pair, from pair p on. frame_at: address of the thread's frame, its int64
    array of addresses and sizes (`decode_frame.py`). given: number of tokens with keys and values. count: number of
    tokens with queries.
    """
    frame = framed(frame_at)
    there, asking = _lying(frame_at + 8 * of.THERE, (given,), 0), _lying(frame_at + 8 * of.ASKING, (count,), 0)
    H, G, E, part, parts = frame[of.HEADS], frame[of.GROUPS], frame[of.HEAD_SIZE], frame[of.PART], frame[of.PARTS]
    memory = _lying(frame[of.OWN_MEMORY], (of.MEMORY,), 0)
    scaling = np.float32(_lying(frame.ctypes.data + 8 * of.NUMBERS, (3,), np.float64(0))[2])
    column, K, at = memory[of.COLUMN], len(there), 0
    query, out = (_lying(frame[of.Q_AT], (len(asking), H, E), ONE), _lying(frame[of.A_AT], (len(asking), H, E), ONE))
    keys, values = _lying(memory[of.KEYS], (column + K, G, E), ONE), _lying(memory[of.VALUES], (column + K, G, E), ONE)
    for j in range(len(asking)):
        while there[at] != asking[j]:
            at += 1
        for h in range((part - j * H) % parts, H, parts):
            g = h // (H // G)
            asked, seen, said = query[j, h : h + 1], keys[:, g : g + 1], values[:, g : g + 1]
            _attend(asked, seen, said, column + at + 1, scaling, out[j, h : h + 1])
