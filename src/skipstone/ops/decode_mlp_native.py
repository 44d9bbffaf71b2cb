"""What happens between the matrices of an MLP in the compiled step of all blocks: functions, and PolyGLU's mixture.

Shape letters: T tokens, D width, F neurons, A activations, R projected width, S = R + 1 entries of a sum.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops.decode_products_native import ZERO, share_of, sigmoid, single_rows
from skipstone.ops.decode_stack import FUNCTIONS, MIXED
from skipstone.ops.decode_step_native import ONE, _exp, compiled
from skipstone.ops.magnitude_native import Array, _lying

SILU, GELU_TANH, RELU, TANH, GELU = range(len(FUNCTIONS))
A = MIXED  # relu, tanh, silu, gelu, in this order
# Columns of a mixture in the table of a block: addresses of its tensors, and R.
CONTEXT_WEIGHT, CONTEXT_BIAS, MIX_WEIGHT, MIX_BIAS, MIX_SCALE, PREFERENCE, TAU, PROJECTED = range(8)
DECAY, PREFERENCE_SCALE = range(2)  # fp32 numbers of a block; a negative decay: the token alone
NUMBERS = 2
SLOPE, CUBE = np.float32(1.5957691216), np.float32(0.044715)  # 2 sqrt(2 / pi)
WHOLE, HALF, ROOT = np.float32(1), np.float32(0.5), np.float32(0.70710678)
# erf to 1.5e-7: formula 7.1.26 of Abramowitz and Stegun
NEAR = np.float32(0.3275911)
ERF = tuple(np.float32(x) for x in (0.254829592, -0.284496736, 1.421413741, -1.453152027, 1.061405429))


@compiled
def gated(gate: Array, up: Array, runs: Array, part: int, parts: int) -> None:
    """Compute gate = function(gate) * up in place for one thread's share of the neurons; compiled by numba.

    gate, up: fp32 [T, F]. runs: int64 [N, 2], indices of functions and the neuron at which each ends. part, parts:
    index and number of threads.
    """
    first, last = share_of(gate.shape[1], part, parts)
    for n in range(gate.shape[0]):
        start = 0
        for i in range(len(runs)):
            low, high = max(start, first), min(runs[i, 1], last)
            if low < high:
                _apply(gate[n, low:high], up[n, low:high], runs[i, 0])
            start = runs[i, 1]


@compiled
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
            gate[f] = _tanh(gate[f]) * up[f]
    elif function == GELU:
        for f in range(len(gate)):
            gate[f] = _gelu(gate[f]) * up[f]
    else:
        for f in range(len(gate)):
            gate[f] = gate[f] * sigmoid(gate[f]) * up[f]


@compiled
def _tanh(x: Array) -> Array:
    small = _exp(-abs(x) - abs(x))
    size = (WHOLE - small) / (WHOLE + small)
    return size if x >= 0 else -size


@compiled
def _gelu(x: Array) -> Array:
    """Return x times the normal distribution function of x, by the error function."""
    size = abs(x) * ROOT
    t = WHOLE / (WHOLE + NEAR * size)
    a, b, c, d, e = ERF
    tail = HALF * t * (a + t * (b + t * (c + t * (d + t * e)))) * _exp(-size * size)
    return x * (WHOLE - tail if x >= 0 else tail)


@compiled
def context(row: Array, tokens: int, width: int, x_at: int, z_at: int, part: int, parts: int) -> None:
    """Project the MLP's input x [T, D] to z [T, R] for one thread's share of the R outputs; compiled by numba.

    row: the mixture's columns in the table of the block. tokens: T. width: D. x_at, z_at: addresses of x and z. part,
    parts: index and number of threads.
    """
    R = row[PROJECTED]
    weight, x = _lying(row[CONTEXT_WEIGHT], (R, width), ONE), _lying(x_at, (tokens, width), ONE)
    first, last = share_of(R, part, parts)
    single_rows(weight, x, _lying(z_at, (tokens, R), ONE), first, last)


@compiled
def mixture_logits(
    row: Array, decay: float, z: Array, slots: Array, memory: Array, column: int, logits: Array, writes: bool
) -> None:
    """Compute PolyGLU's logits [T, A] from the tokens so far, and store their running sums if `writes`.

    Compiled by numba. row: the mixture's columns in the table of the block. decay: factor on older tokens in the
    running mean; if negative, each token counts alone. z: the tokens projected by `context`, [T, R]. slots: the tokens'
    slots (positions in the row), int64. memory: addresses of stored sums and slots. column: number of sums stored so
    far. logits: where the result is written.
    """
    T, R = z.shape
    total, mean = np.zeros(R + 1, np.float32), np.empty(R, np.float32)
    if decay >= 0 and column:
        before = _lying(memory[0], (column, R + 1), ONE)
        for r in range(R + 1):
            total[r] = before[column - 1, r]
    bias, weight = _lying(row[CONTEXT_BIAS], (R,), ONE), _lying(row[MIX_WEIGHT], (A, R), ONE)
    more, scale = _lying(row[MIX_BIAS], (A,), ONE), _lying(row[MIX_SCALE], (A,), ONE)
    for n in range(T):
        keeps = max(decay, ZERO)
        for r in range(R):
            total[r] = total[r] * keeps + z[n, r]
        total[R] = total[R] * keeps + WHOLE
        for r in range(R):
            mean[r] = max(total[r] / max(total[R], WHOLE) + bias[r], ZERO)
        for a in range(A):
            dot = ZERO
            for r in range(R):
                dot += weight[a, r] * mean[r]
            logits[n, a] = scale[a] * (dot + more[a])
        if writes and decay >= 0:
            stored, slot = _lying(memory[0], (column + T, R + 1), ONE), _lying(memory[1], (column + T,), 0)
            slot[column + n] = slots[n]
            for r in range(R + 1):
                stored[column + n, r] = total[r]


@compiled
def mixed(row: Array, scale: float, logits: Array, gate: Array, up: Array, part: int, parts: int) -> None:
    """Compute gate = (sum_k share_k function_k(gate)) * up in place, for one thread's share of the neurons.

    Compiled by numba. row: the mixture's columns in the table of the block. scale: factor on the neurons' preferences.
    logits: the tokens' logits, [T, A] for A functions. gate, up: fp32 [T, F]. part, parts: index and number of threads.
    """
    F = gate.shape[1]
    first, last = share_of(F, part, parts)
    preference, cold = _lying(row[PREFERENCE], (F, A), ONE), WHOLE / _lying(row[TAU], (1,), ONE)[0]
    for n in range(gate.shape[0]):
        c0, c1, c2, c3 = logits[n, 0], logits[n, 1], logits[n, 2], logits[n, 3]
        for f in range(first, last):
            s0, s1 = (preference[f, 0] * scale + c0) * cold, (preference[f, 1] * scale + c1) * cold
            s2, s3 = (preference[f, 2] * scale + c2) * cold, (preference[f, 3] * scale + c3) * cold
            most = max(max(s0, s1), max(s2, s3))
            e0, e1, e2, e3 = _exp(s0 - most), _exp(s1 - most), _exp(s2 - most), _exp(s3 - most)
            x = gate[n, f]
            relu = max(x, ZERO) if x == x else x
            total = e0 * relu + e1 * _tanh(x) + e2 * (x * sigmoid(x)) + e3 * _gelu(x)
            gate[n, f] = total / (e0 + e1 + e2 + e3) * up[n, f]
