"""Approximate logits by a preview of the head, and exact ones of its best candidates, compiled by numba.

Four-bit numbers are multiplied with the turned token in int16 (`int4_dot.py`), whose sums are exact. The m-th largest
preview is found in three steps by the bits of the numbers, so that exactly m candidates are read, of equal previews the
first. Candidates are read in the order of memory.

Shape letters: D width, V vocabulary, K directions, M candidates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from skipstone.ops.decode_stack import FLOATS
from skipstone.ops.int4_dot import lone_fine, lone_row, nibbles, prefetch
from skipstone.ops.int8_dot import FINE, GROUP
from skipstone.ops.int8_native import round_tokens
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.single_dot import FLOAT32, STEP, one_float
from skipstone.ops.workers import BARRIER, inner, integers, part_of, parts_of, share, team, threads, wait

AHEAD = 4  # candidates whose rows are asked for before they are read
LEAST = 1 << 21  # bytes below which a second thread costs more than it saves
TOP, MIDDLE, LOW = 1 << 12, 1 << 10, 1 << 10  # values of a number's first 12 bits, the next 10, and the last 10
SINGLE, INTEGER = np.float32(0), np.int32(0)


def logits(
    x: Tensor,
    turn: Tensor,
    shift: Tensor,
    packed: Tensor,
    scale: Tensor,
    offset: Tensor,
    weight_VD: Tensor,
    weight_scale: Tensor | None,
    candidates: int,
) -> Tensor:
    """Return the logits of one token, exact for the best candidates, [..., V] in the dtype of x.

    x: hidden states [..., D] of one token. turn, shift, packed, scale, offset: the parts of `head_preview.Preview`, a
    low-rank four-bit copy of the head, which picks the candidates and gives all other logits. weight_VD: weight of the
    head for V vocabulary entries, fp32, bf16, fp16 or int8. weight_scale: fp32 scales of an int8 head; None for other
    dtypes. candidates: number of tokens that get exact logits.
    """
    V, D = weight_VD.shape
    K, given = turn.shape[0] - 1, x.reshape(-1).float()
    turned = torch.addmv(shift, turn, given)
    y, chosen = torch.empty(V), np.empty(V, np.int32)
    rounded, whole = np.empty(K, np.int16), np.empty(D, np.int16)
    unit = np.empty(2, np.float32)
    round_tokens.ctypes(turned.data_ptr(), rounded.ctypes.data, unit.ctypes.data, 1, K)
    if weight_scale is not None:
        round_tokens.ctypes(given.data_ptr(), whole.ctypes.data, unit.ctypes.data + 4, 1, D)
    at = [t.data_ptr() for t in (given, turned, packed, scale, offset, weight_VD)]
    at += [0 if weight_scale is None else weight_scale.data_ptr(), y.data_ptr()]
    at += [a.ctypes.data for a in (chosen, rounded, whole, unit)]
    scales = FLOATS[weight_VD.dtype] if weight_scale is None else weight_scale.numel() // V
    numbers = (tuple(at), (V, D, K, min(candidates, V), scales))
    share(crew, numbers, threads() if packed.numel() >= LEAST else 1)
    return y.reshape(*x.shape[:-1], V).to(x.dtype)


@inner
def _run(addresses: Array, sizes: Array, part: int, parts: int, barrier: int) -> None:
    """Compute the logits as one of several threads: preview a share of the vocabulary, then compute a share exactly.

    In between, the first thread chooses the candidates. addresses, sizes: the twelve addresses and the five numbers (V,
    D, K, M, scales per row or dtype of a head without) that `logits` collects. part, parts: index and number of
    threads. barrier: address of the barrier at which they wait for each other.
    """
    V, _, _, M, _ = sizes
    each = -(-V // (GROUP * parts)) * GROUP
    _preview(addresses, sizes, min(part * each, V), min((part + 1) * each, V))
    if parts > 1:
        wait(barrier, parts)
    if part == 0:
        _choose(_lying(addresses[7], (V,), INTEGER), _lying(addresses[8], (V,), INTEGER), M)
    if parts > 1:
        wait(barrier, 2 * parts)
    each = -(-M // parts)
    _exact(addresses, sizes, min(part * each, M), min((part + 1) * each, M))


@inner
def _preview(addresses: Array, sizes: Array, first: int, last: int) -> None:
    _, turned_at, packed_at, scale_at, offset_at, _, _, y_at, _, rounded_at, _, unit_at = addresses
    V, _, K, _, _ = sizes
    turned, rounded = _lying(turned_at, (K + 1,), SINGLE), _lying(rounded_at, (K,), np.int16(0))
    scale, offset = _lying(scale_at, (V,), SINGLE), _lying(offset_at, (V,), SINGLE)
    y, unit = _lying(y_at, (V,), SINGLE), _lying(unit_at, (2,), SINGLE)[0]
    zero = np.int32(0)
    for k in range(K):
        zero += np.int32(8) * np.int32(rounded[k])
    common, groups, row = turned[K], K // GROUP, K // 2
    for v in range(first, last):
        total = np.float32(nibbles(packed_at + v * row, rounded_at, groups) - zero)
        y[v] = total * (scale[v] * unit) + offset[v] + common


@inner
def _ordered(bits: Array) -> Array:
    """Return an int32 that sorts as the fp32 number does whose bits are given as an int32."""
    return bits ^ ((bits >> np.int32(31)) & np.int32(0x7FFFFFFF))


@inner
def _choose(bits: Array, chosen: Array, count: int) -> None:
    """Write the indices of the `count` largest numbers to the front of `chosen`, in ascending order.

    Of equal numbers, the first are chosen. bits: the fp32 numbers, as int32. chosen: int32, as long as `bits`; what
    follows the first `count` is undefined.
    """
    found = np.zeros(TOP, np.int32)
    for v in range(len(bits)):
        found[(_ordered(bits[v]) >> 20) + TOP // 2] += 1
    edge, above = _edge(found, count, 0)
    kept = 0
    for v in range(len(bits)):
        chosen[kept] = v
        kept += (_ordered(bits[v]) >> 20) + TOP // 2 >= edge
    middle, low = np.zeros(MIDDLE, np.int32), np.zeros(LOW, np.int32)
    for i in range(kept):
        key = _ordered(bits[chosen[i]])
        if (key >> 20) + TOP // 2 == edge:
            middle[(key >> 10) & (MIDDLE - 1)] += 1
    second, above = _edge(middle, count, above)
    prefix = ((edge - TOP // 2) << 10) + second
    for i in range(kept):
        key = _ordered(bits[chosen[i]])
        if key >> 10 == prefix:
            low[key & (LOW - 1)] += 1
    third, above = _edge(low, count, above)
    least, equal, out = (prefix << 10) + third, count - above, 0
    for i in range(kept):
        key = _ordered(bits[chosen[i]])
        if key > least or (key == least and equal > 0):
            equal -= key == least
            chosen[out] = chosen[i]
            out += 1


@inner
def _edge(found: Array, count: int, above: int) -> Array:
    """Return the index of the bin that holds the `count`-th largest number, and how many numbers lie above that bin.

    found: histogram, how many numbers lie in each bin, in ascending order. above: how many lie above all bins; they are
    counted, too.
    """
    at = len(found) - 1
    while at > 0 and above + found[at] < count:
        above += found[at]
        at -= 1
    return at, above


@inner
def _exact(addresses: Array, sizes: Array, first: int, last: int) -> None:
    """Write the exact logits of the candidates from `first` to `last` - 1 of the list of chosen tokens.

    An int8 or 16-bit head is summed in the order of a product with all of it, so that the logits are the same.
    addresses, sizes: as in `_run`.
    """
    x_at, _, _, _, _, weight_at, scale_at, y_at, chosen_at, _, whole_at, unit_at = addresses
    V, D, _, _, scales = sizes
    y, chosen = _lying(y_at, (V,), SINGLE), _lying(chosen_at, (V,), INTEGER)
    x, unit = _lying(x_at, (D,), SINGLE), _lying(unit_at, (2,), SINGLE)[1]
    size = D if scale_at else 4 * D if scales == FLOAT32 else 2 * D
    fine, stride = scales * FINE == D, 4 if scales > 1 else 0
    for i in range(first, last):
        if i + AHEAD < last:
            prefetch(weight_at + chosen[i + AHEAD] * size, size)
        v = chosen[i]
        if scale_at:
            weight, scale = weight_at + v * size, scale_at + v * scales * 4
            if fine:
                (total,) = lone_fine(weight, scale, stride, whole_at, 2 * D, scales)
            else:
                (total,) = lone_row(weight, scale, stride, whole_at, 2 * D, D // GROUP)
            y[v] = total * unit
        elif scales != FLOAT32:
            (y[v],) = one_float(scales, weight_at + v * size, x_at, 0, D // STEP)
        else:
            row, single = _lying(weight_at + v * size, (D,), SINGLE), SINGLE
            for d in range(D):
                single += row[d] * x[d]
            y[v] = single


@team
def crew(packet: int) -> None:
    """Compute one thread's part of the result of `logits`; compiled by numba.

    packet: address of the arguments in memory, where `workers.share` has stored them.
    """
    _run(integers(packet, 0, 12), integers(packet, 12, 5), part_of(packet), parts_of(packet), packet + BARRIER)
