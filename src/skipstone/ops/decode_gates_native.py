"""Decisions of depth mechanisms inside the compiled step of all blocks (`decode_stack_native.py`).

What a site of a block does with each token follows from the gates around it, from the outside in. Hidden layers of
routers are shared by all threads; one thread then decides, so that rounding can never make two of them disagree.

Shape letters: T tokens, D width, R hidden width of a router, G gates.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_frame as of
from skipstone.ops.decode_frame import ABSENT, ASKS, GIVES_KEYS
from skipstone.ops.decode_products_native import ZERO, framed, share_of, together
from skipstone.ops.decode_stack import WEIGHTS
from skipstone.ops.decode_step_native import ONE
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import call, inner, unit

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
EPSILON = np.float32(1e-6)
WHOLE = np.float32(1)


@unit(3)
def decide(frame_at: int, site: int, outer: int) -> None:
    """Let a chain of depth mechanisms (gates) decide about the tokens at one site of a block; compiled by numba.

    The gates are those that the table of the block of the frame lists for the site. Written are, for each token in the
    scope of the site, whether it is absent, gives keys only or gets an update, the factor on its sub-layers' updates,
    and that on the whole update, which is noted to act unless it is 1; and what is said of each gate, and carried
    states. outer: the scope outside.
    """
    frame = framed(frame_at)
    T, D, G, part, parts = frame[of.TOKENS], frame[of.WIDTH], frame[of.GATE_COUNT], frame[of.PART], frame[of.PARTS]
    gates = (_lying(frame[of.GATES], (G, GATE_COLUMNS), 0), _lying(frame[of.GATE_LINES], (G, NUMBERS), ONE))
    judged = (
        _lying(frame[of.STATES], (frame[of.STATE_COUNT], T), ONE),
        _lying(frame[of.SAID], (FIELDS, G, T), ONE),
        _lying(frame[of.FLAGS], (2, G, T), np.uint8(0)),
    )
    kind, gain, factor = _scope(frame, T)
    x, hidden_at, row = (
        _lying(frame[of.STREAM], (T, D), ONE),
        frame[of.HIDDEN_AT],
        _lying(frame[of.ROW], (of.COLUMNS,), 0),
    )
    first, count = row[of.OF_SEGMENT + 2 * (site - of.SEGMENT)], row[of.OF_SEGMENT + 2 * (site - of.SEGMENT) + 1]
    for g in range(first, first + count):
        gate = gates[0][g]
        first_hidden = _hidden(frame, gate[SCORER:DECIDER], hidden_at)
        other_hidden = _hidden(frame, gate[DECIDER:DECIDES], hidden_at + 4 * T * gate[HIDDEN])
        if first_hidden or other_hidden:
            together(frame)
        if part == 0:
            for n in range(T):
                _judge(gates, g, n, kind[site, n], x[n], hidden_at, T, judged)
        together(frame)
        _follow(gate, g, (kind[site], gain[site], factor[site]), judged)
    if site != of.SEGMENT and site != of.BLOCK:
        return
    acts = False
    for n in range(T):
        acts = acts or (kind[site, n] == ASKS and factor[site, n] != WHOLE)
    frame[of.ACTS + site] = acts
    if acts:  # this thread's columns of the stream are saved
        start = _lying(frame[of.WORK], (2, T, D), ONE)[site - of.SEGMENT]
        first, last = share_of(D, part, parts)
        for n in range(T):
            for d in range(first, last):
                start[n, d] = x[n, d]


@unit(2)
def weigh(frame_at: int, site: int) -> None:
    """Multiply what a site has added to the stream by each token's factor, in this thread's columns; compiled by numba.

    Only tokens that get an update are changed.
    """
    frame = framed(frame_at)
    T, D = frame[of.TOKENS], frame[of.WIDTH]
    kind, _, factor = _scope(frame, T)
    x, start = _lying(frame[of.STREAM], (T, D), ONE), _lying(frame[of.WORK], (2, T, D), ONE)[site - of.SEGMENT]
    first, last = share_of(D, frame[of.PART], frame[of.PARTS])
    for n in range(T):
        if kind[site, n] == ASKS:
            for d in range(first, last):
                x[n, d] = start[n, d] + factor[site, n] * (x[n, d] - start[n, d])
    together(frame)


@inner
def _scope(frame: Array, tokens: int) -> Array:
    """Return what each token is in each scope, and its two factors there."""
    at = frame.ctypes.data
    gain = _lying(at + 8 * of.GAINS, (of.SCOPES, tokens), ONE)
    factor = _lying(at + 8 * of.FACTORS, (of.SCOPES, tokens), ONE)
    return _lying(at + 8 * of.KINDS, (of.SCOPES, tokens), 0), gain, factor


@inner
def _hidden(frame: Array, router: Array, place: int) -> bool:
    """Multiply a part of a router's hidden layer; return whether it has one."""
    if not router[HIDDEN_WEIGHT]:
        return False
    R, T, D = router[HIDDEN], frame[of.TOKENS], frame[of.WIDTH]
    first, last = share_of(R, frame[of.PART], frame[of.PARTS])
    call(frame[of.SINGLE], (router[HIDDEN_WEIGHT], 0, 0, 1, frame[of.STREAM], 0, place, T, R, D, first, last))
    return True


@inner
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


@inner
def _weight(gate: Array, score: Array, opening: Array) -> Array:
    """Return the factor of a kept token."""
    if gate[FUNCTION] == RAW:
        return np.float32(score)
    if gate[FUNCTION] == OPEN:
        return np.float32(opening)
    if gate[FUNCTION] == TANH:
        return WHOLE + _lying(gate[SCALE], (1,), ONE)[0] * np.float32(np.tanh(score))
    return WHOLE


@inner
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


@inner
def _dot(a: Array, b: Array) -> Array:
    total = ZERO
    for d in range(len(a)):
        total += a[d] * b[d]
    return total


@inner
def _inverse_rms(x: Array) -> Array:
    return np.float32(1 / np.sqrt(_dot(x, x) / np.float32(len(x)) + EPSILON))


@inner
def _follow(gate: Array, g: int, scope: Array, judged: Array) -> None:
    """Enter into the scope what was decided."""
    (kind, gain, factor), (_states, said, flags) = scope, judged
    for n in range(len(kind)):
        if not flags[KEPT, g, n]:
            kind[n] = min(kind[n], GIVES_KEYS if gate[KEYS_OF_ALL] else ABSENT)
        elif gate[ON_UPDATE]:
            factor[n] *= said[FACTOR, g, n]
        else:
            gain[n] *= said[FACTOR, g, n]
