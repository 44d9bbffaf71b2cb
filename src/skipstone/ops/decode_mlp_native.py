"""A block's MLP, with its activation functions, in the decoding step that runs all blocks as one compiled call.

Shape letters: T tokens of the call, K of them that get an update, D width, F neurons, N runs of neurons with the same
function.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_frame as of
from skipstone.ops.decode_products_native import (
    ZERO,
    added,
    bits,
    framed,
    listed,
    normed,
    product,
    rounded,
    share_of,
    sigmoid,
    together,
)
from skipstone.ops.decode_stack import FUNCTIONS
from skipstone.ops.decode_step_native import ONE, _exp
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import call, inner, unit

SILU, GELU_TANH, RELU, TANH, GELU = range(len(FUNCTIONS))
SLOPE, CUBE = np.float32(1.5957691216), np.float32(0.044715)  # 2 sqrt(2 / pi)
WHOLE, HALF, ROOT = np.float32(1), np.float32(0.5), np.float32(0.70710678)
# erf to 1.5e-7: formula 7.1.26 of Abramowitz and Stegun
NEAR = np.float32(0.3275911)
ERF = tuple(np.float32(x) for x in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))


@unit(1)
def mlp(frame_at: int) -> None:
    """Compute the current block's MLP and add it to the residual stream; compiled by numba.

    Only tokens that get an update are computed. These tokens, and the number of neurons whose up projection at least
    one of them needs, are noted in the results of `decode_stack.run` (`Ran.stored`). frame_at: address of the thread's
    frame, its int64 array of addresses and sizes (`decode_frame.py`), which names the block and says which tokens get
    an update.
    """
    frame = framed(frame_at)
    T, D, F, part, parts = frame[of.TOKENS], frame[of.WIDTH], frame[of.NEURONS], frame[of.PART], frame[of.PARTS]
    row = _lying(frame[of.ROW], (of.COLUMNS,), 0)
    stored = _lying(frame[of.STORED], (frame[of.BLOCKS], of.OUTCOMES), 0)
    tokens = _lying(frame_at + 8 * of.ASKING, (T,), 0)
    K = listed(_lying(frame_at + 8 * of.KINDS, (of.SCOPES, T), 0)[of.OF_MLP], of.ASKS, tokens)
    mixes, chooses, block = row[of.COUNT] == 0, row[of.CHOOSES] != 0, frame[of.INDEX]
    if part == 0 and (mixes or chooses):
        fed = _lying(frame[of.FED], (frame[of.BLOCKS], T), np.uint8(0))
        for n in range(T):
            fed[block, n] = 0
        for j in range(K):
            fed[block, tokens[j]] = 1
    stored[block, of.FED_TOKENS], stored[block, of.FED_OF] = K, bits(tokens[:K])
    stored[block, of.NEEDED] = F if K else 0
    if not K and not mixes:
        return
    tokens, x_at, y_at = tokens[:K], frame[of.NORMED], frame[of.Y_AT]
    if K:
        normed(frame, tokens, row[of.BEFORE_M])
        rounded(frame, row[of.GATE + 1] + row[of.UP + 1], x_at, K, D)
        product(frame, of.GATE, (K, F, D), x_at, frame[of.GATE_AT])
    gate, up = _lying(frame[of.GATE_AT], (K, F), ONE), _lying(frame[of.UP_AT], (K, F), ONE)
    if chooses:  # the activations first, and which neurons they leave on
        first, last = share_of(F, part, parts)
        for n in range(K):
            for f in range(first, last):
                up[n, f] = WHOLE
    elif K:
        product(frame, of.UP, (K, F, D), x_at, frame[of.UP_AT])
    if mixes:
        call(frame[of.MIXTURE_OF], (frame_at, K))
        if not K:
            return
    else:
        gated(gate, up, _lying(row[of.RUNS], (row[of.COUNT], 2), 0), part, parts)
    if chooses:
        call(frame[of.CHOSEN], (frame_at, K))
    else:
        together(frame)
        rounded(frame, row[of.DOWN + 1], frame[of.GATE_AT], K, F)
        product(frame, of.DOWN, (K, D, F), frame[of.GATE_AT], y_at)
    gain = _lying(frame_at + 8 * of.GAINS, (of.SCOPES, T), ONE)
    factor = _lying(frame_at + 8 * of.FACTORS, (of.SCOPES, T), ONE)
    scale = _lying(frame_at + 8 * of.SCALES, (K,), ONE)
    for j in range(K):
        scale[j] = gain[of.OF_MLP, tokens[j]] * factor[of.OF_MLP, tokens[j]]
    added(frame, y_at, tokens, scale, row[of.AFTER_M])


@inner
def gated(gate: Array, up: Array, runs: Array, part: int, parts: int) -> None:
    """Compute gate = function(gate) * up in place for one thread's share of the neurons; compiled by numba.

    gate, up: fp32 [K, F] for K tokens and F neurons. runs: int64 [N, 2], for each run of adjacent neurons with the same
    function the function's index in `decode_stack.FUNCTIONS` and the index after the last neuron. part, parts: index
    and number of threads.
    """
    first, last = share_of(gate.shape[1], part, parts)
    for n in range(gate.shape[0]):
        start = 0
        for i in range(len(runs)):
            low, high = max(start, first), min(runs[i, 1], last)
            if low < high:
                _apply(gate[n, low:high], up[n, low:high], runs[i, 0])
            start = runs[i, 1]


@inner
def _apply(gate: Array, up: Array, function: int) -> None:
    if function == RELU:
        for f in range(len(gate)):
            gate[f] = max(gate[f], ZERO) * up[f] if gate[f] == gate[f] else gate[f]
    elif function == GELU_TANH:
        for f in range(len(gate)):
            a = gate[f]
            gate[f] = a * sigmoid(SLOPE * (a + CUBE * a * a * a)) * up[f]
    elif function == TANH:
        for f in range(len(gate)):
            gate[f] = tanh(gate[f]) * up[f]
    elif function == GELU:
        for f in range(len(gate)):
            gate[f] = gelu(gate[f]) * up[f]
    else:
        for f in range(len(gate)):
            gate[f] = gate[f] * sigmoid(gate[f]) * up[f]


@inner
def tanh(x: Array) -> Array:
    """Return the hyperbolic tangent of x in fp32; compiled by numba."""
    small = _exp(-abs(x) - abs(x))
    size = (WHOLE - small) / (WHOLE + small)
    return size if x >= 0 else -size


@inner
def gelu(x: Array) -> Array:
    """Return x times the normal distribution function of x, by the error function; compiled by numba."""
    size = abs(x) * ROOT
    t = WHOLE / (WHOLE + NEAR * size)
    a, b, c, d, e = ERF
    tail = HALF * t * (a + t * (b + t * (c + t * (d + t * e)))) * _exp(-size * size)
    return x * (WHOLE - tail if x >= 0 else tail)
