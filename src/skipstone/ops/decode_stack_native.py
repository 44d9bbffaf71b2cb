"""All blocks of a decoder in one compiled call, for a few tokens of one row or for one token of each of several rows.

Weights are read as they are stored, in fp32, 16, 8 or 4 bits, and once for all tokens; weights that no token needs are
not read. Several threads share the rows of every matrix; they wait for each other six times a block. Norms and
roundings, which take no time, are repeated by each. Numba compiles the functions of a step one by one, and only those
that a model needs.

Shape letters: T tokens, D width, F neurons, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import numpy as np

from skipstone.ops import decode_frame as of
from skipstone.ops.decode_attention_native import attend, attention, turn
from skipstone.ops.decode_frame import BLOCK, OF_ATTENTION, OF_MLP, OUTSIDE, SCOPES, SEGMENT
from skipstone.ops.decode_frame import FRAME as FRAME
from skipstone.ops.decode_gates_native import FIELDS as FIELDS
from skipstone.ops.decode_gates_native import decide, weigh
from skipstone.ops.decode_mixture_native import mixture
from skipstone.ops.decode_mlp_native import mlp
from skipstone.ops.decode_neurons_native import chosen_neurons, spread
from skipstone.ops.decode_products_native import framed, single_rows
from skipstone.ops.int4_native import four_bit_rows
from skipstone.ops.int8_native import grouped_rows, round_tokens
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.neuron_rows_native import summed, summed_int8
from skipstone.ops.workers import BARRIER, Unit, call, inner, part_of, parts_of, team
from skipstone.ops.workers import GIVEN as PACKET
from skipstone.ops.workers import share as share
from skipstone.ops.workers import threads as threads

WHOLE = np.float32(1)
ALWAYS, INT8, INT4, ROUNDS = (
    (attention, turn, attend, mlp, single_rows),
    (grouped_rows,),
    (four_bit_rows,),
    (round_tokens,),
)
MIXES, CHOOSES, GATES = (mixture,), (chosen_neurons, spread, summed, summed_int8), (decide, weigh)
UNITS = (*ALWAYS, *INT8, *INT4, *ROUNDS, *MIXES, *CHOOSES, *GATES)  # in the order of the frame


def units(int8: bool, int4: bool, mixes: bool, chooses: bool, gated: bool) -> tuple[int, ...]:
    """Compile the functions of a decoding step that a model needs; return the addresses, 0 for the others.

    The addresses are in the order of `UNITS`. int8, int4: whether any weights are int8, and whether any have four bits.
    mixes: whether any activation is a mixture. chooses: whether any MLP chooses its neurons. gated: whether there are
    depth mechanisms.
    """
    used: set[Unit] = {*ALWAYS, crew}
    rounded = ((INT8, int8), (INT4, int4), (ROUNDS, int8 or int4))
    for group, needed in (*rounded, (MIXES, mixes), (CHOOSES, chooses), (GATES, gated)):
        used.update(group if needed else ())
    if not int8:
        used.discard(summed_int8)
    return tuple(unit.address if unit in used else 0 for unit in (*UNITS, crew))[:-1]


@team
def crew(packet: int) -> None:
    """Run all blocks of a decoder as one of several threads, adding their updates to the stream x [T, D] in place.

    Compiled by numba. Each thread computes its share of the rows of every matrix. packet: address of the arguments,
    which `workers.share` has stored. They are what every thread's frame, its int64 array of addresses and sizes, begins
    with: the entries before index `GIVEN` of `decode_frame.py`.
    """
    part, parts, given = part_of(packet), parts_of(packet), _lying(packet + PACKET, (of.GIVEN,), 0)
    frame_at = given[of.WORK] + 8 * of.FRAME * part
    frame = framed(frame_at)
    for i in range(of.GIVEN):
        frame[i] = given[i]
    frame[of.PART], frame[of.PARTS], frame[of.BARRIER], frame[of.ARRIVALS] = part, parts, packet + BARRIER, 0
    frame[of.WORK] += 8 * of.FRAME * parts
    _place(frame)
    T, scope = frame[of.TOKENS], frame_at + 8 * of.KINDS
    kind, gain = _lying(scope, (SCOPES, T), 0), _lying(frame_at + 8 * of.GAINS, (SCOPES, T), WHOLE)
    factor = _lying(frame_at + 8 * of.FACTORS, (SCOPES, T), WHOLE)
    for n in range(T):
        kind[OUTSIDE, n], gain[OUTSIDE, n], factor[OUTSIDE, n] = of.ASKS, WHOLE, WHOLE
    left, outer_acts = 0, 0
    for block in range(frame[of.BLOCKS]):
        frame[of.INDEX] = block
        frame[of.ROW] = frame[of.TABLE] + 8 * of.COLUMNS * block
        frame[of.OWN_MEMORY] = frame[of.MEMORIES] + 8 * of.MEMORY * block
        row = _lying(frame[of.ROW], (of.COLUMNS,), 0)
        left = max(left, row[of.SPAN])
        for site in range(SEGMENT if row[of.SPAN] else BLOCK, SCOPES):
            outer = BLOCK if site > BLOCK else SEGMENT if site == BLOCK and left else OUTSIDE
            for n in range(T):
                kind[site, n], gain[site, n], factor[site, n] = kind[outer, n], gain[outer, n], WHOLE
            frame[of.ACTS + site] = 0
            if row[of.OF_SEGMENT + 2 * (site - SEGMENT) + 1]:
                call(frame[of.DECIDE], (frame_at, site))
            if site == SEGMENT:
                outer_acts = frame[of.ACTS + site]
            elif site == OF_ATTENTION:
                call(frame[of.ATTENTION], (frame_at,))
            elif site == OF_MLP:
                call(frame[of.MLP], (frame_at,))
        left -= 1 if left else 0
        if frame[of.ACTS + BLOCK]:
            call(frame[of.WEIGH], (frame_at, BLOCK))
        if outer_acts and not left:
            call(frame[of.WEIGH], (frame_at, SEGMENT))
        if not left:
            outer_acts = 0


@inner
def _place(frame: Array) -> None:
    """Write the addresses of the thread's working memory into its frame.

    All threads share the memory of intermediate results; each has its own for a list of neurons and for normalised and
    rounded tokens.
    """
    T, D, F, H, G = frame[of.TOKENS], frame[of.WIDTH], frame[of.NEURONS], frame[of.HEADS], frame[of.GROUPS]
    E, wide = frame[of.HEAD_SIZE], frame[of.WIDEST]
    frame[of.HIDDEN_AT] = frame[of.WORK] + 8 * T * D  # after the stream where a segment and a block began
    frame[of.Q_AT] = frame[of.HIDDEN_AT] + 4 * T * frame[of.HIDDEN]
    frame[of.K_AT] = frame[of.Q_AT] + 4 * T * H * E
    frame[of.V_AT] = frame[of.K_AT] + 4 * T * G * E
    frame[of.A_AT] = frame[of.V_AT] + 4 * T * G * E
    frame[of.Y_AT] = frame[of.A_AT] + 4 * T * H * E
    frame[of.GATE_AT] = frame[of.Y_AT] + 4 * T * D
    frame[of.UP_AT] = frame[of.GATE_AT] + 4 * T * F
    own = frame[of.UP_AT] + 4 * T * F
    frame[of.LIST] = own + -own % 64 + frame[of.PART] * frame[of.PRIVATE]
    frame[of.NORMED] = frame[of.LIST] + 8 * F
    frame[of.ROUNDED] = frame[of.NORMED] + 4 * T * wide
    frame[of.UNIT] = frame[of.NORMED] + 6 * T * wide
