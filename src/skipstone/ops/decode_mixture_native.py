"""PolyGLU's mixture of activations in the decoding step that runs all blocks as one compiled call.

Shape letters: T tokens of the call, K of them that get an update of the MLP, F neurons, A activations, R width of the
context projection. The mean of contexts that the router reads comes from a running sum in the cache: R + 1 numbers, the
last of which is the sum of the tokens' weights.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_frame as of
from skipstone.ops.decode_mlp_native import WHOLE, gelu, tanh
from skipstone.ops.decode_products_native import ZERO, framed, share_of, sigmoid, together
from skipstone.ops.decode_stack import MIXED
from skipstone.ops.decode_step_native import ONE, _exp
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import call, inner, unit

A = MIXED  # relu, tanh, silu, gelu, in this order
# Columns of a mixture in the table of a block: addresses of its tensors, and R.
CONTEXT_WEIGHT, CONTEXT_BIAS, MIX_WEIGHT, MIX_BIAS, MIX_SCALE, PREFERENCE, TAU, PROJECTED = range(8)
DECAY, PREFERENCE_SCALE = range(2)  # fp32 numbers of a block; a negative decay: the token alone
NUMBERS = 2


@unit(2)
def mixture(frame_at: int, count: int) -> None:
    """Compute PolyGLU's gate = sum_a share_a act_a(gate) * up in place for K tokens of the current block's MLP.

    Compiled by numba. The shares of the activations (ReLU, tanh, SiLU, GELU) follow from a router's logits.

    frame_at: address of the thread's frame, its int64 array of addresses and sizes (`decode_frame.py`), which holds the
    addresses of gate and up, fp32 [K, F]. count: K. The router's logits are written to the call's results, NaN for
    tokens whose MLP is not computed. The router reads a mean of projections of the row's tokens so far, whose running
    sums are written to the cache, or the projection of the token alone.
    """
    frame = framed(frame_at)
    T, L, F, block, part = frame[of.TOKENS], frame[of.BLOCKS], frame[of.NEURONS], frame[of.INDEX], frame[of.PART]
    row = _lying(frame[of.ROW], (of.COLUMNS,), 0)[of.MIX :]
    said = _lying(frame[of.LOGITS], (L, T, A), ONE)[block]
    if part == 0:
        for n in range(T):
            for a in range(A):
                said[n, a] = np.float32(np.nan)
    if not count:
        return
    R, D, z_at = row[PROJECTED], frame[of.WIDTH], frame[of.HIDDEN_AT]
    first, last = share_of(R, part, frame[of.PARTS])
    call(frame[of.SINGLE], (row[CONTEXT_WEIGHT], 0, 0, 1, frame[of.NORMED], 0, z_at, count, R, D, first, last))
    together(frame)
    tokens, numbers = _lying(frame_at + 8 * of.ASKING, (count,), 0), _lying(frame[of.BLOCK_NUMBERS], (L, NUMBERS), ONE)
    z, logits = _lying(z_at, (count, R), ONE), np.empty((count, A), np.float32)
    _logits(frame, row, numbers[block, DECAY], z, tokens, logits)
    gate, up = _lying(frame[of.GATE_AT], (count, F), ONE), _lying(frame[of.UP_AT], (count, F), ONE)
    _mixed(row, numbers[block, PREFERENCE_SCALE], logits, gate, up, part, frame[of.PARTS])
    for j in range(count if part == 0 else 0):
        for a in range(A):
            said[tokens[j], a] = logits[j, a]


@inner
def _logits(frame: Array, row: Array, decay: float, z: Array, tokens: Array, logits: Array) -> None:
    """Compute PolyGLU's logits of K tokens from the running means of their contexts; one thread stores the sums.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`). row: the mixture's columns in the table
    of the block. decay: factor on the sum at each further token; if negative, each token counts alone. z: the tokens'
    context projections, fp32 [K, R]. tokens: their indices in the call. logits: fp32 [K, A], where the result is
    written.
    """
    (K, R), memory, writes = z.shape, _lying(frame[of.OWN_MEMORY], (of.MEMORY,), 0), frame[of.PART] == 0
    slots, by_row = _lying(frame[of.SLOT], (frame[of.TOKENS],), 0), frame[of.BY_ROW]
    total, mean = np.zeros(R + 1, np.float32), np.empty(R, np.float32)
    bias, weight = _lying(row[CONTEXT_BIAS], (R,), ONE), _lying(row[MIX_WEIGHT], (A, R), ONE)
    more, scale = _lying(row[MIX_BIAS], (A,), ONE), _lying(row[MIX_SCALE], (A,), ONE)
    for n in range(K):
        keeps = max(decay, ZERO)
        text = tokens[n] if by_row else 0
        place = memory[of.SUM_LENGTHS + text] + (0 if by_row else n)
        at = text * memory[of.SUM_ROOM] + place
        if by_row or n == 0:
            for r in range(R + 1):
                total[r] = ZERO
            if decay >= 0 and place:
                before = _lying(memory[of.SUMS] + 4 * (at - 1) * (R + 1), (R + 1,), ONE)
                for r in range(R + 1):
                    total[r] = before[r]
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
            _lying(memory[of.SUM_SLOTS] + 8 * at, (1,), 0)[0] = slots[tokens[n]]
            stored = _lying(memory[of.SUMS] + 4 * at * (R + 1), (R + 1,), ONE)
            for r in range(R + 1):
                stored[r] = total[r]


@inner
def _mixed(row: Array, scale: float, logits: Array, gate: Array, up: Array, part: int, parts: int) -> None:
    """Compute gate = (sum_k share_k function_k(gate)) * up in place, for one thread's share of the neurons.

    row: the mixture's columns in the table of the block. scale: factor on the neurons' preferences. logits: the tokens'
    logits, [K, A]. gate, up: fp32 [K, F]. part, parts: index and number of threads.
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
            total = e0 * relu + e1 * tanh(x) + e2 * (x * sigmoid(x)) + e3 * gelu(x)
            gate[n, f] = total / (e0 + e1 + e2 + e3) * up[n, f]
