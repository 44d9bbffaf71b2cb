"""All blocks of a decoder for a few tokens of one row, compiled by numba to one call.

Weights are read as they are stored, fp32 or int8, and once for all tokens; those that no token needs are not read.
Several threads share the rows of every matrix; they wait for each other six times a block. Norms and roundings, which
take no time, are repeated by each.

Shape letters: L blocks, T tokens, K of them, D width, F neurons, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_gates_native as of_gates
from skipstone.ops import decode_mlp_native as of_mlp
from skipstone.ops import decode_neurons_native as of_neurons
from skipstone.ops.decode_gates_native import (
    ASKS,
    BLOCK,
    GIVES_KEYS,
    OF_ATTENTION,
    OF_MLP,
    OUTSIDE,
    SCOPES,
    SEGMENT,
    decide,
    listed,
    remembered,
    weigh,
)
from skipstone.ops.decode_mlp_native import context, gated, mixed, mixture_logits
from skipstone.ops.decode_products_native import norm_row, product, rounded, share_of, together
from skipstone.ops.decode_products_native import private as private
from skipstone.ops.decode_stack import CHOICE, MIXTURE
from skipstone.ops.decode_step_native import ONE, _attend, _rotate, compiled
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import BARRIER, doubles, integers, part_of, parts_of, team
from skipstone.ops.workers import share as share
from skipstone.ops.workers import threads as threads

# Columns of the table of a block: addresses of norms (0: none); then of each matrix the addresses of weight, scale
# (0: fp32 weights) and bias (0: none), and the number of scales of a row.
NORMS = ("before_attention", "after_attention", "before_mlp", "after_mlp", "query", "key")
MATRICES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
BEFORE_A, AFTER_A, BEFORE_M, AFTER_M, OF_QUERY, OF_KEY = range(6)
QUERY, KEY, VALUE, OUT, GATE, UP, DOWN = range(6, 34, 4)
# Then, for each site from the outside in, its first gate and the number of its gates; the blocks of the segment
# that begins here (0: none); address and number of the runs of functions (none: the activation is a mixture); and the
# mixture; and the choice of neurons.
OF_SEGMENT = 34
SPAN, RUNS, COUNT = range(42, 45)
MIX = 45
CHOOSES = MIX + MIXTURE
COLUMNS = CHOOSES + CHOICE
# Columns of the memory of a block: addresses of stored keys, values and slots, the first new column, addresses of cos
# and sin (0: not rotated); addresses of the activation's stored sums and slots, and their first new column.
KEYS, VALUES, SLOTS, COLUMN, COS, SIN, SUMS, SUM_SLOTS, SUM_COLUMN = range(9)
MEMORY = 9
GATES, NUMBERS, GATE_NUMBERS, FIELDS = of_gates.GATE_COLUMNS, of_mlp.NUMBERS, of_gates.NUMBERS, of_gates.FIELDS


@compiled
def run(addresses: Array, sizes: Array, numbers: Array, part: int, parts: int, barrier: int) -> None:
    """Add the updates of all blocks to the stream x [T, D], for one thread's share of the rows of all matrices.

    Compiled by numba. addresses: the addresses of the blocks' table and memory, the tokens' slots, the stream, working
    memory, table and numbers of the depth mechanisms, numbers of the blocks, and the results, as `decode_stack.run`
    passes them. sizes: L blocks, T tokens, width, neurons, query heads, key/value heads, head size, mechanisms, carried
    states, hidden values. numbers: eps and offset of norms, factor on scores. part, parts: index and number of threads.
    barrier: its address.
    """
    table_at, memory_at, slot_at, x_at, work_at, gates_at, lines_at, block_numbers_at = addresses[:8]
    states_at, said_at, flags_at, logits_at, fed_at, stored_at, scores_at, marks_at = addresses[8:]
    L, T, D, F, H, G, E, gate_count, states, hidden = sizes
    table, memory = _lying(table_at, (L, COLUMNS), 0), _lying(memory_at, (L, MEMORY), 0)
    x, slots, crowd = _lying(x_at, (T, D), ONE), _lying(slot_at, (T,), 0), (part, parts, barrier)
    gates = (_lying(gates_at, (gate_count, GATES), 0), _lying(lines_at, (gate_count, GATE_NUMBERS), ONE))
    judged = (
        _lying(states_at, (states, T), ONE),
        _lying(said_at, (FIELDS, gate_count, T), ONE),
        _lying(flags_at, (2, gate_count, T), np.uint8(0)),
    )
    logits, fed = _lying(logits_at, (L, T, of_mlp.A), ONE), _lying(fed_at, (L, T), np.uint8(0))
    stored = _lying(stored_at, (L, 3), 0)
    block_numbers = _lying(block_numbers_at, (L, NUMBERS), ONE)
    scope = (np.full((SCOPES, T), ASKS), np.ones((SCOPES, T), np.float32), np.ones((SCOPES, T), np.float32))
    kind, _gain, factor = scope
    start = _lying(work_at, (2, T, D), ONE)  # the stream where a segment and a block began
    hidden_at = work_at + 8 * T * D
    places = _places(hidden_at + 4 * T * hidden, (T, D, F, H, G, E), part)
    arrivals, left, outer_acts, acts = 0, 0, False, False
    for block in range(L):
        row, given = table[block], (table[block], memory[block], (T, D, F, H, G, E), numbers)
        for site in range(SEGMENT, SCOPES):  # in one place, or the compiler would repeat all of it
            if site == SEGMENT:
                left = max(left, row[SPAN])
                if not row[SPAN]:
                    continue
            arrivals = decide(gates, _chain(row, site, left), scope, x, judged, hidden_at, crowd, arrivals)
            if site == SEGMENT:
                outer_acts = remembered(kind[SEGMENT], factor[SEGMENT], x, start[0], part, parts)
            elif site == BLOCK:
                acts = remembered(kind[BLOCK], factor[BLOCK], x, start[1], part, parts)
            elif site == OF_ATTENTION:
                arrivals, count = _attended(given, scope, x, slots, places, crowd, arrivals)
                stored[block, 0] = count
            else:
                mix = (block_numbers[block], logits[block], fed[block], hidden_at)
                said = (scores_at, marks_at, block, L)
                arrivals, count, needed = _fed(given, scope, x, slots, places, mix, said, crowd, arrivals)
                stored[block, 1], stored[block, 2] = count, needed
        left -= 1 if left else 0
        for site in range(BLOCK, OUTSIDE, -1):
            if acts if site == BLOCK else outer_acts and not left:
                weigh(kind[site], factor[site], x, start[site - 1], part, parts)
                arrivals = together(parts, barrier, arrivals)
        outer_acts = outer_acts and left > 0


@compiled
def _chain(row: Array, site: int, left: int) -> Array:
    """Return a site's first gate, the number of its gates, the scope outside of it, and its own."""
    outer = BLOCK if site > BLOCK else SEGMENT if site == BLOCK and left else OUTSIDE
    return row[OF_SEGMENT + 2 * (site - SEGMENT)], row[OF_SEGMENT + 2 * (site - SEGMENT) + 1], outer, site


@compiled
def _places(at: int, sizes: Array, part: int) -> Array:
    """Return the addresses of q, k, v, a, y, gate, up, and of a thread's own normed and rounded tokens and units."""
    T, D, F, H, G, E = sizes
    q_at = at
    k_at = q_at + 4 * T * H * E
    v_at = k_at + 4 * T * G * E
    a_at = v_at + 4 * T * G * E
    y_at = a_at + 4 * T * H * E
    g_at = y_at + 4 * T * D
    u_at = g_at + 4 * T * F
    own = u_at + 4 * T * F
    own += -own % 64 + part * private(T, max(D, F, H * E))
    return q_at, k_at, v_at, a_at, y_at, g_at, u_at, own, own + 4 * T * max(D, F, H * E), own + 6 * T * max(D, F, H * E)


@compiled
def _attended(given: Array, scope: Array, x: Array, slots: Array, places: Array, crowd: Array, arrivals: int) -> Array:
    """Add the attention's update; return the arrivals that end the next wait, and how many tokens were stored."""
    (row, memory, (T, D, _F, H, G, E), numbers), (kind, gain, factor), (part, parts, barrier) = given, scope, crowd
    q_at, k_at, v_at, a_at, y_at = places[:5]
    own = places[7:]
    there, asking, scale = np.empty(T, np.int64), np.empty(T, np.int64), np.empty(T, np.float32)
    given_count = listed(kind[OF_ATTENTION], GIVES_KEYS, there)
    asking_count = listed(kind[OF_ATTENTION], ASKS, asking)
    if not given_count:
        return arrivals, 0
    _normed(x, there[:given_count], row[BEFORE_A], numbers, own)
    rounded(row[QUERY + 1] + row[KEY + 1] + row[VALUE + 1], own[0], own, given_count, D)
    product(row[KEY : KEY + 4], (given_count, G * E, D), own[0], own, k_at, part, parts)
    product(row[VALUE : VALUE + 4], (given_count, G * E, D), own[0], own, v_at, part, parts)
    if asking_count:
        if asking_count < given_count:
            _normed(x, asking[:asking_count], row[BEFORE_A], numbers, own)
            rounded(row[QUERY + 1], own[0], own, asking_count, D)
        product(row[QUERY : QUERY + 4], (asking_count, H * E, D), own[0], own, q_at, part, parts)
    arrivals = together(parts, barrier, arrivals)
    tokens = (there[:given_count], asking[:asking_count], slots)
    found = (q_at, k_at, v_at, a_at)
    _turned(row, memory, found, tokens, (H, G, E), numbers, part, parts)
    arrivals = together(parts, barrier, arrivals)
    _attention(memory, found, tokens, (H, G, E), numbers[2], part, parts)
    if not asking_count:
        return together(parts, barrier, arrivals), given_count
    arrivals = together(parts, barrier, arrivals)
    rounded(row[OUT + 1], a_at, own, asking_count, H * E)
    product(row[OUT : OUT + 4], (asking_count, D, H * E), a_at, own, y_at, part, parts)
    for j in range(asking_count):
        scale[j] = gain[OF_ATTENTION, asking[j]] * factor[OF_ATTENTION, asking[j]]
    y = _lying(y_at, (asking_count, D), ONE)
    return _added(x, y, asking, scale, row[AFTER_A], numbers, part, parts, barrier, arrivals), given_count


@compiled
def _fed(
    given: Array,
    scope: Array,
    x: Array,
    slots: Array,
    places: Array,
    mix: Array,
    said: Array,
    crowd: Array,
    arrivals: int,
) -> Array:
    """Add the MLP's update.

    Return the arrivals that end the next wait, how many tokens the activation has seen, and how many neurons they need.
    """
    (row, memory, sizes, numbers), (kind, gain, factor), (part, parts, barrier) = given, scope, crowd
    T, D, F = sizes[:3]
    y_at, g_at, u_at = places[4:7]
    own, (block_numbers, logits, fed, z_at) = places[7:], mix
    tokens, scale, mixes = np.empty(T, np.int64), np.empty(T, np.float32), row[COUNT] == 0
    K = listed(kind[OF_MLP], ASKS, tokens)
    chooses, needed = row[CHOOSES + of_neurons.DECISION] != 0, F
    if part == 0:
        if mixes:
            logits[:] = np.float32(np.nan)
        if mixes or chooses:
            fed[:] = 0
            for j in range(K):
                fed[tokens[j]] = 1
    if not K:
        return arrivals, 0, 0
    _normed(x, tokens[:K], row[BEFORE_M], numbers, own)
    rounded(row[GATE + 1] + row[UP + 1], own[0], own, K, D)
    product(row[GATE : GATE + 4], (K, F, D), own[0], own, g_at, part, parts)
    gate, up = _lying(g_at, (K, F), ONE), _lying(u_at, (K, F), ONE)
    if chooses:  # the activations first, and which neurons they leave on
        of_neurons.fill(up, share_of(F, part, parts), of_mlp.WHOLE)
    else:
        product(row[UP : UP + 4], (K, F, D), own[0], own, u_at, part, parts)
    if mixes:
        context(row[MIX:], K, D, own[0], z_at, part, parts)
        arrivals = together(parts, barrier, arrivals)
        z, found = _lying(z_at, (K, row[MIX + of_mlp.PROJECTED]), ONE), np.empty((K, of_mlp.A), np.float32)
        stored, decay = memory[SUMS : SUM_SLOTS + 1], block_numbers[of_mlp.DECAY]
        mixture_logits(row[MIX:], decay, z, slots[tokens[:K]], stored, memory[SUM_COLUMN], found, part == 0)
        mixed(row[MIX:], block_numbers[of_mlp.PREFERENCE_SCALE], found, gate, up, part, parts)
        for j in range(K if part == 0 else 0):
            logits[tokens[j]] = found[j]
    else:
        gated(gate, up, _lying(row[RUNS], (row[COUNT], 2), 0), part, parts)
    if chooses:
        arrivals, needed = _some(row, (g_at, u_at, y_at, own), (T, D, F), tokens[:K], said, crowd, arrivals)
    else:
        arrivals = together(parts, barrier, arrivals)
        rounded(row[DOWN + 1], g_at, own, K, F)
        product(row[DOWN : DOWN + 4], (K, D, F), g_at, own, y_at, part, parts)
    for j in range(K):
        scale[j] = gain[OF_MLP, tokens[j]] * factor[OF_MLP, tokens[j]]
    y = _lying(y_at, (K, D), ONE)
    return _added(x, y, tokens, scale, row[AFTER_M], numbers, part, parts, barrier, arrivals), K, needed


@compiled
def _some(row: Array, places: Array, sizes: Array, tokens: Array, said: Array, crowd: Array, arrivals: int) -> Array:
    """Multiply the activations by the up matrix, and the down matrix by them, for the neurons that are chosen.

    Return the arrivals that end the next wait, and how many neurons some token needs for the up matrix.
    """
    (g_at, u_at, y_at, own), (T, D, F), K, (part, parts, barrier) = places, sizes, len(tokens), crowd
    choice, own_share = row[CHOOSES:], share_of(F, part, parts)
    a, up, h = _lying(g_at, (K, F), ONE), _lying(u_at, (K, F), ONE), _lying(own[0], (K, F), ONE)
    on, rows = np.empty((K, F), np.bool_), np.empty(F, np.int64)
    scores = np.empty((K, F // choice[of_neurons.SIZE]), np.float32)
    if choice[of_neurons.BY_NEURON]:
        of_neurons.fill(up, own_share, of_mlp.ZERO)
    else:
        product(row[UP : UP + 4], (K, F, D), own[0], own, u_at, part, parts)
        for n in range(K):
            for f in range(own_share[0], own_share[1]):
                up[n, f] *= a[n, f]
    arrivals = together(parts, barrier, arrivals)
    of_neurons.tried(choice, a, on, scores)
    if part == 0:
        of_neurons.note(said, choice, tokens, (T, F), on, scores, 0)
    needed = of_neurons.needed(on, rows)
    if choice[of_neurons.BY_NEURON]:
        read = of_neurons.or_all(needed, rows)
        start, end = of_neurons.part_of_list(read, part, parts)
        of_neurons.multiplied(row[UP : UP + 4], own[0], own, D, rows[start:end], a, on, up)
        arrivals = together(parts, barrier, arrivals)
    of_neurons.kept(choice, up, on)
    if part == 0:
        of_neurons.note(said, choice, tokens, (T, F), on, scores, 1)
    for n in range(K):
        for f in range(F):
            h[n, f] = up[n, f] if on[n, f] else of_mlp.ZERO
    rounded(row[DOWN + 1], own[0], own, K, F)
    if choice[of_neurons.BY_NEURON]:
        read = of_neurons.or_all(of_neurons.needed(on, rows), rows)
        first, last = share_of(D, part, parts)
        of_neurons.summed(row[DOWN : DOWN + 4], own[0], own, (K, F, D), rows[:read], y_at, first, last)
    else:
        product(row[DOWN : DOWN + 4], (K, D, F), own[0], own, y_at, part, parts)
    return arrivals, needed


@compiled
def _normed(x: Array, tokens: Array, weight_at: int, numbers: Array, own: Array) -> None:
    """Normalise some tokens by root mean square, or copy them."""
    out = _lying(own[0], (len(tokens), x.shape[1]), ONE)
    for j in range(len(tokens)):
        norm_row(x[tokens[j]], weight_at, numbers[0], numbers[1], out[j])


@compiled
def _turned(
    row: Array, memory: Array, addresses: Array, tokens: Array, sizes: Array, numbers: Array, part: int, parts: int
) -> None:
    """Norm and rotate queries and keys, and store keys, values and slots, for every `parts`-th head.

    tokens: those that give keys, those that ask, and all slots.
    """
    (q_at, k_at, v_at, _), (there, asking, slots), (H, G, E) = addresses, tokens, sizes
    column, K = memory[COLUMN], len(there)
    query = _lying(q_at, (len(asking), H, E), ONE)
    key, value = _lying(k_at, (K, G, E), ONE), _lying(v_at, (K, G, E), ONE)
    keys, values = _lying(memory[KEYS], (column + K, G, E), ONE), _lying(memory[VALUES], (column + K, G, E), ONE)
    stored = _lying(memory[SLOTS], (column + K,), 0)
    for j in range(K):
        cos_at, sin_at = _angles(memory, there[j], E)
        if part == 0:
            stored[column + j] = slots[there[j]]
        for g in range(part, G, parts):
            if row[OF_KEY]:
                norm_row(key[j, g], row[OF_KEY], numbers[0], numbers[1], key[j, g])
            _rotate(key[j, g : g + 1], cos_at, sin_at, keys[column + j, g : g + 1])
            for e in range(E):
                values[column + j, g, e] = value[j, g, e]
    for j in range(len(asking)):
        cos_at, sin_at = _angles(memory, asking[j], E)
        for h in range(part, H, parts):
            if row[OF_QUERY]:
                norm_row(query[j, h], row[OF_QUERY], numbers[0], numbers[1], query[j, h])
            if cos_at:
                _rotate(query[j, h : h + 1], cos_at, sin_at, query[j, h : h + 1])


@compiled
def _angles(memory: Array, token: int, width: int) -> Array:
    """Return the addresses of cos and sin of a token; 0 where nothing is rotated."""
    if memory[COS]:
        return memory[COS] + 4 * token * width, memory[SIN] + 4 * token * width
    return 0, 0


@compiled
def _attention(
    memory: Array, addresses: Array, tokens: Array, sizes: Array, scaling: float, part: int, parts: int
) -> None:
    """Attend with every `parts`-th query of all tokens and heads that ask."""
    (q_at, _, _, a_at), (there, asking, _), (H, G, E) = addresses, tokens, sizes
    column, K, at = memory[COLUMN], len(there), 0
    query, out = _lying(q_at, (len(asking), H, E), ONE), _lying(a_at, (len(asking), H, E), ONE)
    keys, values = _lying(memory[KEYS], (column + K, G, E), ONE), _lying(memory[VALUES], (column + K, G, E), ONE)
    for j in range(len(asking)):
        while there[at] != asking[j]:
            at += 1
        for h in range((part - j * H) % parts, H, parts):
            g = h // (H // G)
            asked, seen, said = query[j, h : h + 1], keys[:, g : g + 1], values[:, g : g + 1]
            _attend(asked, seen, said, column + at + 1, np.float32(scaling), out[j, h : h + 1])


@compiled
def _added(
    x: Array,
    y: Array,
    tokens: Array,
    scale: Array,
    norm_at: int,
    numbers: Array,
    part: int,
    parts: int,
    barrier: int,
    arrivals: int,
) -> int:
    """Add the scaled update y [K, D] to the stream of its tokens.

    A norm of the update needs all of it, and only one thread computes it.
    """
    if norm_at:
        arrivals = together(parts, barrier, arrivals)
    first, last = share_of(x.shape[1], part, parts)
    if norm_at:
        first, last = (0, x.shape[1]) if part == 0 else (0, 0)
    for j in range(y.shape[0]):
        if norm_at and part == 0:
            norm_row(y[j], norm_at, numbers[0], numbers[1], y[j])
        for d in range(first, last):
            x[tokens[j], d] += y[j, d] * scale[j]
    return together(parts, barrier, arrivals)


@team
def crew(packet: int) -> None:
    """Run one thread's part of `run`; `packet` is the address of the arguments (`workers.share`)."""
    given = (integers(packet, 0, 16), integers(packet, 16, 10), doubles(packet, 26, 3))
    run(*given, part_of(packet), parts_of(packet), packet + BARRIER)
