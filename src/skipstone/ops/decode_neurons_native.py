"""The up and down products of an MLP for chosen neurons only, in a decoding step that is one compiled call.

The gate product has been computed for all neurons, and the neurons of each token are chosen from it, as the model's
`NeuronChoice` says (`core/stream_gate.py`). Weights are read for the neurons that at least one token needs, or for all
where that is nearly as many. Rows of the up matrix belong to neurons; the down matrix is stored neuron by neuron, so
that its rows do, too. Reading all or some gives the same numbers, to the last bit (`neuron_rows_native.py`).

Shape letters: K tokens, D width, F neurons, G groups of neurons.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_frame as of
from skipstone.ops.decode_products_native import ZERO, framed, product, rounded, share_of, together
from skipstone.ops.decode_stack import DECISIONS
from skipstone.ops.decode_step_native import ONE
from skipstone.ops.magnitude_native import Array, _lying, _mark
from skipstone.ops.neuron_rows_native import multiplied_int8, multiplied_single
from skipstone.ops.workers import call, inner, unit

# Columns of a choice in the table of a block: the decision (0: there is none), numbers of groups that are tried and
# kept, neurons of a group, the address of their typical sizes, and whether the down matrix lies neuron by neuron.
DECISION, TRIED, KEPT, SIZE, TYPICAL, BY_NEURON = range(6)
ZEROS, LARGEST = DECISIONS.index("zeros"), DECISIONS.index("largest")
WORTH = np.float32(0.9)  # the share of neurons up to which reading some is less work than reading all
NEVER = np.float32(-1)  # below every score


@unit(2)
def chosen_neurons(frame_at: int, count: int) -> None:
    """Compute the up and down products of the current block's MLP for chosen neurons only; compiled by numba.

    frame_at: address of the thread's frame, its int64 array of addresses and sizes (`decode_frame.py`), which holds the
    addresses of the activations, fp32 [K, F] for K tokens and F neurons, and of the result, fp32 [K, D] for width D.
    count: the number of tokens K. The number of neurons whose up projection at least one token needs is written to the
    results of `decode_stack.run` (`Ran.stored`), and so are the scores and choices of the neuron groups
    (`Ran.score_LN`, `Ran.mark_2LN`).
    """
    frame = framed(frame_at)
    D, F, K, part, parts = frame[of.WIDTH], frame[of.NEURONS], count, frame[of.PART], frame[of.PARTS]
    row, tokens = _lying(frame[of.ROW], (of.COLUMNS,), 0), _lying(frame_at + 8 * of.ASKING, (count,), 0)
    choice, x_at = row[of.CHOOSES :], frame[of.NORMED]
    first, last = share_of(F, part, parts)
    a, up, h = (
        _lying(frame[of.GATE_AT], (K, F), ONE),
        _lying(frame[of.UP_AT], (K, F), ONE),
        _lying(frame[of.NORMED], (K, F), ONE),
    )
    on, rows = np.empty((K, F), np.bool_), _lying(frame[of.LIST], (F,), 0)
    scores = np.empty((K, F // choice[SIZE]), np.float32)
    if not choice[BY_NEURON]:
        product(frame, of.UP, (K, F, D), x_at, frame[of.UP_AT])
    for n in range(K):
        for f in range(first, last):
            up[n, f] = ZERO if choice[BY_NEURON] else up[n, f] * a[n, f]
    together(frame)
    tried(frame, choice, a, on, scores)
    if part == 0:
        note(frame, choice, tokens, on, scores, 0)
    least = needed(on, rows)
    if choice[BY_NEURON]:
        start, end = part_of_list(or_all(least, rows), part, parts)
        multiplied(frame, row[of.UP : of.UP + 4], rows[start:end], a, on, up)
        together(frame)
    kept(frame, choice, up, on)
    if part == 0:
        note(frame, choice, tokens, on, scores, 1)
        _lying(frame[of.STORED], (frame[of.BLOCKS], of.OUTCOMES), 0)[frame[of.INDEX], of.NEEDED] = least
    for n in range(K):
        for f in range(F):
            h[n, f] = up[n, f] if on[n, f] else ZERO
    rounded(frame, row[of.DOWN + 1], x_at, K, F)
    if choice[BY_NEURON]:
        read = or_all(needed(on, rows), rows)
        first, last = share_of(D, part, parts)
        matrix = (row[of.DOWN], row[of.DOWN + 1], row[of.DOWN + 3], x_at, frame[of.ROUNDED], frame[of.UNIT])
        to = frame[of.SUMMED_INT8] if row[of.DOWN + 1] else frame[of.SUMMED]
        call(to, (*matrix, K, F, D, frame[of.LIST], read, frame[of.Y_AT], first, last))
    else:
        product(frame, of.DOWN, (K, D, F), x_at, frame[of.Y_AT])


@inner
def tried(frame: Array, choice: Array, a: Array, on: Array, scores: Array) -> None:
    """Choose the neurons for which the up matrix is multiplied, token by token; compiled by numba.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`). choice: numbers that say how neurons are
    chosen, by the indices `DECISION` to `BY_NEURON` of this module. a: activations of the gates, fp32 [K, F] for K
    tokens and F neurons. on: bool [K, F], where the choice is written. scores: fp32 [K, G], where the score of each of
    G groups of neurons is written, by which the groups are chosen.
    """
    if choice[DECISION] == ZEROS:
        for n in range(a.shape[0]):
            for f in range(a.shape[1]):
                on[n, f] = a[n, f] != ZERO
                scores[n, f] = abs(a[n, f])
        return
    typical, size = _lying(choice[TYPICAL], (a.shape[1],), ONE), choice[SIZE]
    for n in range(a.shape[0]):
        for g in range(scores.shape[1]):
            total = ZERO
            for f in range(g * size, (g + 1) * size):
                total += abs(a[n, f]) * typical[f]
            scores[n, g] = total / np.float32(size)
        spread_at = (scores[n].ctypes.data, scores.shape[1], choice[TRIED], size, on[n].ctypes.data)
        call(frame[of.SPREAD], spread_at)


@inner
def kept(frame: Array, choice: Array, h: Array, on: Array) -> None:
    """Drop from `on` the neurons whose group is not among those with the largest products; compiled by numba.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`). choice: numbers that say how neurons are
    chosen, by the indices `DECISION` to `BY_NEURON` of this module; nothing is dropped if as many groups are kept as
    were tried. h: products of activation and up projection, fp32 [K, F] for K tokens and F neurons. on: bool [K, F],
    the choice of `tried`, changed in place: the neurons that stay are multiplied by the down matrix.
    """
    if choice[DECISION] == ZEROS or choice[KEPT] == choice[TRIED]:
        return
    size, apart = choice[SIZE], NEVER if h.shape[0] == 1 else ZERO
    groups = h.shape[1] // size
    magnitude = np.empty(groups, np.float32)
    for n in range(h.shape[0]):
        for g in range(groups):
            total = ZERO
            for f in range(g * size, (g + 1) * size):
                total += abs(h[n, f])
            magnitude[g] = total if on[n, g * size] else apart
        call(frame[of.SPREAD], (magnitude.ctypes.data, groups, choice[KEPT], size, on[n].ctypes.data))


@unit(5)
def spread(score_at: int, groups: int, count: int, size: int, on_at: int) -> None:
    """Mark the neurons of the `count` groups with the largest scores; compiled by numba.

    score_at: address of the groups' scores, fp32. groups: number of groups. count: number of groups that are marked.
    size: neurons per group. on_at: address of the marks, a byte for each neuron: 1 in these groups, 0 in all others.
    """
    score, on, chosen = (
        _lying(score_at, (groups,), ONE),
        _lying(on_at, (groups * size,), False),
        np.zeros(groups, np.bool_),
    )
    _mark(score, count, chosen)
    for g in range(groups):
        for f in range(g * size, (g + 1) * size):
            on[f] = chosen[g]


@inner
def needed(on: Array, rows: Array) -> int:
    """Write the indices of the neurons that at least one token needs to `rows`, ascending, and return their number.

    Compiled by numba. on: bool [K, F], the neurons that each of K tokens needs. rows: int64 [F] for F neurons, of which
    the entries behind the last index are left as they are.
    """
    count = 0
    for f in range(on.shape[1]):
        some = on[0, f]
        for n in range(1, on.shape[0]):
            some |= on[n, f]
        rows[count] = f
        count += some
    return count


@inner
def or_all(count: int, rows: Array) -> int:
    """Return how many neurons' weights to read: `count`, or all if reading all of them is less work than picking.

    Compiled by numba. count: number of neurons that some token needs. rows: int64 [F] for F neurons, which begins with
    their indices; if all neurons are to be read, the indices 0, 1, 2, ... are written here.
    """
    if np.float32(count) <= WORTH * np.float32(len(rows)):
        return count
    for f in range(len(rows)):
        rows[f] = f
    return len(rows)


@inner
def note(frame: Array, choice: Array, tokens: Array, on: Array, scores: Array, which: int) -> None:
    """Write the scores of neuron groups, and which groups are on, into the tables that become the caller's records.

    Compiled by numba. frame: the thread's int64 array of addresses and sizes (`decode_frame.py`); its address of scores
    is 0 if no records are wanted, and then nothing is written. choice: numbers that say how neurons are chosen, by the
    indices `DECISION` to `BY_NEURON`. tokens: indices of the K tokens among those of the call. on: whether each of the
    F neurons is on, bool [K, F], equal within a group. scores: scores of the G groups, fp32 [K, G]. which: 0 for the
    groups that are tried, 1 for those that are kept.
    """
    (K, G), T, F = scores.shape, frame[of.TOKENS], frame[of.NEURONS]
    if not frame[of.SCORES]:
        return
    score = _lying(frame[of.SCORES] + 4 * frame[of.INDEX] * T * F, (T, G), ONE)
    mark = _lying(frame[of.MARKS] + (which * frame[of.BLOCKS] + frame[of.INDEX]) * T * F, (T, G), np.uint8(0))
    for n in range(K):
        for g in range(G):
            score[tokens[n], g] = scores[n, g]
            mark[tokens[n], g] = on[n, g * choice[SIZE]]


@inner
def multiplied(frame: Array, matrix: Array, rows: Array, a: Array, on: Array, h: Array) -> None:
    """Compute h = a * (weight x) for listed neurons, and 0 where a token does not need one; compiled by numba.

    frame: the thread's int64 array of addresses and sizes (`decode_frame.py`); it holds the addresses of the tokens x,
    in fp32 and rounded to int16. matrix: of the up matrix, the addresses of weight, scale and bias (not read), and the
    number of scales per row. rows: indices of the neurons. a: activations, fp32 [K, F] for K tokens and F neurons. on:
    bool [K, F], the neurons that each token needs. h: fp32 [K, F], where the result is written; columns of other
    neurons are left as they are.
    """
    if matrix[1]:
        multiplied_int8(matrix, (frame[of.ROUNDED], frame[of.UNIT]), frame[of.WIDTH], rows, h)
    else:
        multiplied_single(matrix[0], frame[of.NORMED], frame[of.WIDTH], rows, h, frame[of.SINGLE])
    for n in range(a.shape[0]):
        for f in rows:
            h[n, f] = h[n, f] * a[n, f] if on[n, f] else ZERO


@inner
def part_of_list(count: int, part: int, parts: int) -> Array:
    """Return the range of one thread's part of a list: its first index and the index after its last; compiled by numba.

    count: length of the list. part, parts: index and number of threads.
    """
    each = -(-count // parts)
    return min(part * each, count), min((part + 1) * each, count)
