"""A block's attention in the decoding step that runs all blocks as one compiled call (`decode_stack_native.py`).

Shape letters: T tokens of the call, D width, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_frame as of
from skipstone.ops.decode_products_native import (
    added,
    bits,
    framed,
    listed,
    norm_row,
    normed,
    product,
    rounded,
    share_of,
    together,
)
from skipstone.ops.decode_step_native import ONE, _rotate, attend_heads, store
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import call, inner, unit


@unit(1)
def attention(frame_at: int) -> None:
    """Compute the current block's attention and add it to the residual stream; compiled by numba.

    Keys and values are stored for the tokens that reach the attention, and these tokens are noted in the results of
    `decode_stack.run` (`Ran.stored`); only tokens that get an update have queries. frame_at: address of the thread's
    frame, its int64 array of addresses and sizes (`decode_frame.py`), which names the block and says which tokens reach
    the attention.
    """
    frame = framed(frame_at)
    T, D, H, G, E = frame[of.TOKENS], frame[of.WIDTH], frame[of.HEADS], frame[of.GROUPS], frame[of.HEAD_SIZE]
    row = _lying(frame[of.ROW], (of.COLUMNS,), 0)
    kind = _lying(frame_at + 8 * of.KINDS, (of.SCOPES, T), 0)[of.OF_ATTENTION]
    there, asking = _lying(frame_at + 8 * of.THERE, (T,), 0), _lying(frame_at + 8 * of.ASKING, (T,), 0)
    given, count = listed(kind, of.GIVES_KEYS, there), listed(kind, of.ASKS, asking)
    said = _lying(frame[of.STORED], (frame[of.BLOCKS], of.OUTCOMES), 0)[frame[of.INDEX]]
    said[of.GIVEN_KEYS], said[of.KEYS_OF] = given, bits(there[:given])
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
    """Normalise and rotate queries and keys, and store keys, values and slots in the cache.

    Compiled by numba. A slot is a token's index in its row. Norms are applied if the block has them (QK-norm). Of P
    threads, thread p computes heads p, p + P, p + 2P and so on. frame_at: address of the thread's frame, its int64
    array of addresses and sizes (`decode_frame.py`). given: number of tokens with keys and values. count: number of
    tokens with queries.
    """
    frame = framed(frame_at)
    there, asking = _lying(frame_at + 8 * of.THERE, (given,), 0), _lying(frame_at + 8 * of.ASKING, (count,), 0)
    H, G, E, part, parts = frame[of.HEADS], frame[of.GROUPS], frame[of.HEAD_SIZE], frame[of.PART], frame[of.PARTS]
    row, memory = _lying(frame[of.ROW], (of.COLUMNS,), 0), _lying(frame[of.OWN_MEMORY], (of.MEMORY,), 0)
    numbers, slots = (
        _lying(frame.ctypes.data + 8 * of.NUMBERS, (3,), np.float64(0)),
        _lying(frame[of.SLOT], (frame[of.TOKENS],), 0),
    )
    K, query = len(there), _lying(frame[of.Q_AT], (len(asking), H, E), ONE)
    key, value = _lying(frame[of.K_AT], (K, G, E), ONE), _lying(frame[of.V_AT], (K, G, E), ONE)
    for j in range(K):
        cos_at, sin_at = _angles(memory, there[j], E)
        text, place = place_of(frame, memory, there[j], j)
        at, size = text * memory[of.ROOM] + place, memory[of.NUMBER]
        key_at, value_at = memory[of.KEYS] + size * at * G * E, memory[of.VALUES] + size * at * G * E
        if part == 0:
            _lying(memory[of.SLOTS] + 8 * at, (1,), 0)[0] = slots[there[j]]
        for g in range(part, G, parts):
            if row[of.OF_KEY]:
                norm_row(key[j, g], row[of.OF_KEY], numbers[0], numbers[1], key[j, g])
            if cos_at:
                _rotate(key[j, g : g + 1], cos_at, sin_at, key[j, g : g + 1])
            store(key[j, g], key_at + size * g * E, size)
            store(value[j, g], value_at + size * g * E, size)
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


@inner
def place_of(frame: Array, memory: Array, token: int, index: int) -> tuple[int, int]:
    """Return the row of the KV cache to which a token belongs, and the place in that row where its key is stored.

    Compiled by numba. frame: the thread's int64 array of addresses and sizes (`decode_frame.py`). memory: int64, the
    addresses and lengths of the block's cache, by the indices `KEYS` to `SUM_LENGTHS` of `decode_frame.py`. token:
    index of the token in the call. index: its index among the call's tokens whose keys are stored.
    """
    if frame[of.BY_ROW]:
        return token, memory[of.LENGTHS + token]
    return 0, memory[of.LENGTHS] + index


@unit(3)
def attend(frame_at: int, given: int, count: int) -> None:
    """Compute the attention of this thread's share of all pairs of a token and a query head; compiled by numba.

    Each thread computes a contiguous share, so that query heads that read the same keys read them together. frame_at:
    address of the thread's frame, its int64 array of addresses and sizes (`decode_frame.py`). given: number of tokens
    with keys and values. count: number of tokens with queries.
    """
    frame = framed(frame_at)
    there, asking = _lying(frame_at + 8 * of.THERE, (given,), 0), _lying(frame_at + 8 * of.ASKING, (count,), 0)
    H, G, E, slots = (
        frame[of.HEADS],
        frame[of.GROUPS],
        frame[of.HEAD_SIZE],
        _lying(frame[of.SLOT], (frame[of.TOKENS],), 0),
    )
    memory, each = _lying(frame[of.OWN_MEMORY], (of.MEMORY,), 0), H // G
    scaling = np.float32(_lying(frame.ctypes.data + 8 * of.NUMBERS, (3,), np.float64(0))[2])
    pair, last = share_of(count * H, frame[of.PART], frame[of.PARTS])
    size, at = memory[of.NUMBER], 0
    while pair < last:
        j, h = pair // H, pair % H
        heads = min(H - h, last - pair)
        while there[at] != asking[j]:
            at += 1
        text, place = place_of(frame, memory, asking[j], at)
        entry = text * memory[of.ROOM]
        first = _first_seen(memory, entry, place, slots[asking[j]])
        from_at = size * ((entry + first) * G + h // each) * E
        query = _lying(frame[of.Q_AT] + 4 * pair * E, (heads, E), ONE)
        out = _lying(frame[of.A_AT] + 4 * pair * E, (heads, E), ONE)
        stored = (memory[of.KEYS] + from_at, memory[of.VALUES] + from_at, size * G * E, size)
        attend_heads(query, (each, h % each), stored, place + 1 - first, scaling, out)
        pair += heads


@inner
def _first_seen(memory: Array, entry: int, place: int, slot: int) -> int:
    """Return the place in its row of the first stored key that a token sees: 0 without an attention window.

    memory: the block's row in the table of caches. entry: index of the row's first entry in the store. place: place of
    the token's own key. slot: the token's slot; a window of W lets it see the keys of slots slot - W + 1 and later.
    """
    window, low = memory[of.WINDOW], 0
    if not window or slot < window:
        return 0
    stored, high = _lying(memory[of.SLOTS] + 8 * entry, (place + 1,), 0), place
    while low < high:  # slots ascend
        middle = (low + high) // 2
        if stored[middle] > slot - window:
            high = middle
        else:
            low = middle + 1
    return low
