"""Decisions of depth mechanisms inside the compiled step of all blocks (`decode_stack_native.py`).

What a site of a block does with each token follows from the gates around it, from the outside in. Hidden layers of
routers are shared by all threads; one thread then decides, so that rounding can never make two of them disagree.

Shape letters: T tokens, D width, R hidden width of a router, G gates.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.decode_products_native import ZERO, share_of, single_rows, together
from skipstone.ops.decode_stack import WEIGHTS
from skipstone.ops.decode_step_native import ONE, compiled
from skipstone.ops.magnitude_native import Array, _lying

# Columns of the table of a gate. First those of a router, twice: what gives the score, and what decides in its place.
# Addresses of W1 [R, D] and b1 (0: no hidden layer), of w2 and b2 (0: none), R, and whether x is divided by its root
# mean square.
HIDDEN_WEIGHT, HIDDEN_BIAS, WEIGHT, BIAS, HIDDEN, NORM = range(6)
SCORER, DECIDER = 0, 6
# Then: whether there is such a decider, addresses of threshold and scale (0: none), the function that gives the weight,
# whether the opening is compared, whether the weight acts on the whole update, whether other tokens give keys and
# values, and the row of `states` (-1: none).
DECIDES, THRESHOLD, SCALE, FUNCTION, OPENING, ON_UPDATE, KEYS_OF_ALL, STATE = range(12, 20)
GATE_COLUMNS = 20
SIGN, LINE, LOSS = range(3)  # fp32 numbers of a gate
NUMBERS = 3
RAW, OPEN, TANH = (WEIGHTS.index(name) for name in ("raw", "opening", "tanh"))
# What is said of each gate and token: fp32, and two flags.
SCORE, FACTOR, COST, STATE_AFTER = range(4)
FIELDS = 4
KEPT, REACHED = range(2)
# What a token is inside a site.
ABSENT, GIVES_KEYS, ASKS = range(3)
# The scopes of sites, one inside the other, except that the MLP's is inside the block's.
OUTSIDE, SEGMENT, BLOCK, OF_ATTENTION, OF_MLP = range(5)
SCOPES = 5
EPSILON = np.float32(1e-6)
WHOLE = np.float32(1)


@compiled
def decide(
    gates: Array, chain: Array, scope: Array, x: Array, judged: Array, hidden_at: int, team: Array, arrivals: int
) -> int:
    """Let a chain of depth mechanisms (gates) decide about the tokens at one site of a block; compiled by numba.

    gates: int64 table and fp32 numbers of all gates (columns as listed in this file). chain: index of the first gate,
    number of gates, index of the scope outside, and of the scope to fill. scope: for each scope and token, whether the
    token is absent, gives keys only or gets an update; the factor on its sub-layers' updates; and that on the whole
    update. x: the stream [T, D]. judged: what is written: carried states, [FIELDS, G, T] numbers and [2, G, T] flags.
    hidden_at: address of memory for hidden layers of routers. team: index of the thread, number of threads, address of
    their barrier. arrivals: count that ends the next wait at the barrier; the new count is returned.
    """
    (table, _numbers), (first, count, outer, inner), (kind, gain, factor) = gates, chain, scope
    part, parts, barrier = team
    T = x.shape[0]
    for n in range(T):
        kind[inner, n], gain[inner, n], factor[inner, n] = kind[outer, n], gain[outer, n], WHOLE
    for g in range(first, first + count):
        gate = table[g]
        first_hidden = _hidden(gate[SCORER:DECIDER], x, hidden_at, part, parts)
        other_hidden = _hidden(gate[DECIDER:DECIDES], x, hidden_at + 4 * T * gate[HIDDEN], part, parts)
        if first_hidden or other_hidden:
            arrivals = together(parts, barrier, arrivals)
        if part == 0:
            for n in range(T):
                _judge(gates, g, n, kind[inner, n], x[n], hidden_at, T, judged)
        arrivals = together(parts, barrier, arrivals)
        _follow(gate, g, inner, scope, judged)
    return arrivals


@compiled
def _hidden(router: Array, x: Array, place: int, part: int, parts: int) -> bool:
    """Multiply a part of a router's hidden layer; return whether it has one."""
    if not router[HIDDEN_WEIGHT]:
        return False
    R = router[HIDDEN]
    first, last = share_of(R, part, parts)
    weight = _lying(router[HIDDEN_WEIGHT], (R, x.shape[1]), ONE)
    single_rows(weight, x, _lying(place, (x.shape[0], R), ONE), first, last)
    return True


@compiled
def _judge(gates: Array, g: int, n: int, kind: int, x: Array, hidden_at: int, tokens: int, judged: Array) -> None:
    """Decide about one token, which the gate sees only if it is there."""
    (table, numbers), (states, said, flags) = gates, judged
    gate, state = table[g], table[g, STATE]
    before = states[state, n] if state >= 0 else WHOLE
    said[SCORE, g, n], said[FACTOR, g, n], said[COST, g, n] = np.float32(np.nan), ZERO, ZERO
    said[STATE_AFTER, g, n] = before
    flags[KEPT, g, n] = flags[REACHED, g, n] = 0
    if kind == ABSENT:
        return
    inverse = _inverse_rms(x) if gate[SCORER + NORM] or gate[DECIDER + NORM] else WHOLE
    score = numbers[g, SIGN] * _scored(gate[SCORER:DECIDER], x, inverse, hidden_at + 4 * n * gate[HIDDEN])
    opening = np.float32(1 / (1 + np.exp(-score))) * before
    compared = opening if gate[OPENING] else score
    if gate[DECIDES]:
        place = hidden_at + 4 * (tokens * gate[HIDDEN] + n * gate[DECIDER + HIDDEN])
        compared = _scored(gate[DECIDER:DECIDES], x, inverse, place)
    line = _lying(gate[THRESHOLD], (1,), ONE)[0] if gate[THRESHOLD] else numbers[g, LINE]
    if compared > line or line == -np.inf:
        flags[KEPT, g, n] = 1
        said[FACTOR, g, n] = _weight(gate, score, opening)
    flags[REACHED, g, n] = 1
    said[SCORE, g, n], said[COST, g, n] = score, numbers[g, LOSS] * opening
    if state >= 0:
        states[state, n] = said[STATE_AFTER, g, n] = opening


@compiled
def _weight(gate: Array, score: Array, opening: Array) -> Array:
    """Return the factor of a kept token."""
    if gate[FUNCTION] == RAW:
        return np.float32(score)
    if gate[FUNCTION] == OPEN:
        return np.float32(opening)
    if gate[FUNCTION] == TANH:
        return WHOLE + _lying(gate[SCALE], (1,), ONE)[0] * np.float32(np.tanh(score))
    return WHOLE


@compiled
def _scored(router: Array, x: Array, inverse: Array, hidden_at: int) -> Array:
    """Return the score of one token, whose hidden layer has been multiplied but not completed."""
    factor = inverse if router[NORM] else WHOLE
    bias = _lying(router[BIAS], (1,), ONE)[0] if router[BIAS] else ZERO
    if not router[WEIGHT]:
        return bias
    if not router[HIDDEN_WEIGHT]:
        return _dot(_lying(router[WEIGHT], (len(x),), ONE), x) * factor + bias
    R = router[HIDDEN]
    weight, hidden = _lying(router[WEIGHT], (R,), ONE), _lying(hidden_at, (R,), ONE)
    more, total = _lying(router[HIDDEN_BIAS], (R,), ONE), ZERO
    for r in range(R):
        total += weight[r] * max(hidden[r] * factor + more[r], ZERO)
    return total + bias


@compiled
def _dot(a: Array, b: Array) -> Array:
    total = ZERO
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@compiled
def _inverse_rms(x: Array) -> Array:
    return np.float32(1 / np.sqrt(_dot(x, x) / np.float32(len(x)) + EPSILON))


@compiled
def _follow(gate: Array, g: int, inner: int, scope: Array, judged: Array) -> None:
    """Enter into the scope what was decided."""
    (kind, gain, factor), (_states, said, flags) = scope, judged
    for n in range(kind.shape[1]):
        if not flags[KEPT, g, n]:
            kind[inner, n] = min(kind[inner, n], GIVES_KEYS if gate[KEYS_OF_ALL] else ABSENT)
        elif gate[ON_UPDATE]:
            factor[inner, n] *= said[FACTOR, g, n]
        else:
            gain[inner, n] *= said[FACTOR, g, n]


@compiled
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


@compiled
def remembered(kinds: Array, factor: Array, x: Array, start: Array, part: int, parts: int) -> bool:
    """Save this thread's columns of the stream if a factor other than 1 will scale an update; return whether it did.

    Compiled by numba. kinds: what each token is (ABSENT, GIVES_KEYS, or ASKS: gets an update). factor: the factor on
    each token's update. x: the residual stream [T, D]. start: where the copy is written. part, parts: index and number
    of threads.
    """
    acts = False
    for n in range(len(kinds)):
        acts = acts or (kinds[n] == ASKS and factor[n] != WHOLE)
    if acts:
        first, last = share_of(x.shape[1], part, parts)
        for n in range(len(kinds)):
            for d in range(first, last):
                start[n, d] = x[n, d]
    return acts


@compiled
def weigh(kinds: Array, factor: Array, x: Array, start: Array, part: int, parts: int) -> None:
    """Multiply what was added to the stream since `remembered` by each token's factor, in this thread's columns.

    Compiled by numba. kinds: what each token is; only those that get an update (ASKS) are changed. factor: the factor
    on each token's update. x: the residual stream [T, D]. start: the copy of it from `remembered`. part, parts: index
    and number of threads.
    """
    first, last = share_of(x.shape[1], part, parts)
    for n in range(len(kinds)):
        if kinds[n] == ASKS:
            for d in range(first, last):
                x[n, d] = start[n, d] + factor[n] * (x[n, d] - start[n, d])
