"""Decisions of depth mechanisms (gates) in the decoding step that runs all blocks as one compiled call.

The step is in `decode_stack_native.py`.

At each site (a segment, a block, its attention, its MLP), the gates of that site decide about the tokens one after the
other, the outermost first. All threads share the matrix products of the routers; one thread then decides, so that
rounding can never make two of them decide differently.

Shape letters: T tokens, D width, R hidden width of a router, G gates, S sites, F results per gate and token (score,
weight, loss, carried state).
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


@unit(2)
def decide(frame_at: int, site: int) -> None:
    """Let the depth mechanisms (gates) at one site of the current block decide about the tokens; compiled by numba.

    frame_at: address of the thread's frame, its int64 array of addresses and sizes (`decode_frame.py`). site: SEGMENT,
    BLOCK, OF_ATTENTION or OF_MLP. For each token of the site, the frame then holds its kind (absent, only gives keys
    and values, or gets an update), the factor on the updates of attention and MLP (gain), and the factor on the site's
    whole update. The gates' scores, weights, losses and masks are written to the call's results, and the states that
    gates carry from block to block (`state_SBT` of `decode_stack.run`) are updated. If a factor on a whole update is
    not 1, a copy of the stream is kept, from which `weigh` finds the update.
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
    """Multiply what a segment or block has added to the residual stream by each token's factor; compiled by numba.

    Tokens without an update stay as they are. frame_at: address of the thread's frame, its int64 array of addresses and
    sizes (`decode_frame.py`); it holds the factors that `decide` wrote. site: SEGMENT or BLOCK. Each thread changes its
    share of the stream's columns.
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
    """Return kind, gain and factor of the tokens at every site, [S + 1, T] each, as `decide` describes them."""
    at = frame.ctypes.data
    gain = _lying(at + 8 * of.GAINS, (of.SCOPES, tokens), ONE)
    factor = _lying(at + 8 * of.FACTORS, (of.SCOPES, tokens), ONE)
    return _lying(at + 8 * of.KINDS, (of.SCOPES, tokens), 0), gain, factor


@inner
def _hidden(frame: Array, router: Array, place: int) -> bool:
    """Compute this thread's share of W1 x, a router's hidden layer, for all tokens; return False if it has none.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`). router: the router's columns in the
    table of gates. place: address of the result, fp32 [T, R], without bias and ReLU.
    """
    if not router[HIDDEN_WEIGHT]:
        return False
    R, T, D = router[HIDDEN], frame[of.TOKENS], frame[of.WIDTH]
    first, last = share_of(R, frame[of.PART], frame[of.PARTS])
    call(frame[of.SINGLE], (router[HIDDEN_WEIGHT], 0, 0, 1, frame[of.STREAM], 0, place, T, R, D, first, last))
    return True


@inner
def _judge(gates: Array, g: int, n: int, kind: int, x: Array, hidden_at: int, tokens: int, judged: Array) -> None:
    """Decide about token n by gate g, and write score, weight, loss, state and flags.

    An absent token does not reach the gate. gates: table and fp32 numbers of all gates. kind: the token's kind at the
    site. x: the token's residual stream [D]. hidden_at: address of the products of the routers' hidden layers. tokens:
    T. judged: where the results are written: carried states [states, T], results fp32 [F, G, T], and flags [2, G, T],
    which say whether the gate kept the token and whether the token reached it.
    """
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
    """Return the factor on the update of a kept token: its score, its opening, 1 + scale * tanh(score), or 1.

    gate: the gate's row in the table, which says which of these. opening: sigmoid(score), times the carried state if
    any.
    """
    if gate[FUNCTION] == RAW:
        return np.float32(score)
    if gate[FUNCTION] == OPEN:
        return np.float32(opening)
    if gate[FUNCTION] == TANH:
        return WHOLE + _lying(gate[SCALE], (1,), ONE)[0] * np.float32(np.tanh(score))
    return WHOLE


@inner
def _scored(router: Array, x: Array, inverse: Array, hidden_at: int) -> Array:
    """Return a router's score of one token.

    router: the router's columns in the table of gates. x: the token's residual stream [D]. inverse: 1 / root mean
    square of x, by which x is multiplied if the router asks for it. hidden_at: address of W1 x, fp32 [R], without bias
    and ReLU; not read for a router without a hidden layer.
    """
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
    """Update kind, gain and factor of the tokens at a site by what one gate decided about them.

    gate: the gate's row in the table. g: its index. scope: kind, gain and factor of the site, [T] each. judged: what
    `_judge` wrote.
    """
    (kind, gain, factor), (_states, said, flags) = scope, judged
    for n in range(len(kind)):
        if not flags[KEPT, g, n]:
            kind[n] = min(kind[n], GIVES_KEYS if gate[KEYS_OF_ALL] else ABSENT)
        elif gate[ON_UPDATE]:
            factor[n] *= said[FACTOR, g, n]
        else:
            gain[n] *= said[FACTOR, g, n]
