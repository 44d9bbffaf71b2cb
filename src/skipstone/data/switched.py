"""Switched-S3: a variant of Reset-S3 in which a symbol alone does not show whether it is an operation.

Fillers and operations share one alphabet: the six elements of S3 and the reset. The last switch decides what a symbol
is: after `on` it is an operation on a state (an element multiplies it, the reset sets it to the identity), after `off`
a filler, whose label is itself and which does not change the state. So a router that sees a single token can do no
better than chance.

Each entry is, independently, a switch (probability 1/8; `on` with 2/7, else `off`) or a symbol (reset 1/16, else a
uniform element); the first entry of a row is always a switch. So one entry in four is an operation (1/4 = 2/7 * 7/8,
except for the first), whatever its symbol. A switch's label is itself.

Ids: 0 off, 1 on, 2..7 elements, 8 reset, 9..14 states (labels only): a vocabulary of 15. An operation's label is the
state after it. `difficulty` counts operations since the last reset that was an operation; fillers and switches have -1.
Shapes: B rows, T entries per row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from skipstone.data import draws
from skipstone.data.rows import Batch, RowDataset
from skipstone.data.synthetic import ELEMENTS, RESET_SHARE, ROW_LENGTH, aligned, solve

SWITCH_SHARE = 1 / 8
ON_SHARE = 2 / 7  # of switches
NUM_DRAWS = 4

OFF, ON = 0, 1
FIRST_ELEMENT = 2
RESET = FIRST_ELEMENT + len(ELEMENTS)
FIRST_STATE = RESET + 1
NAMES = ("off", "on", *(f"g{i}" for i in range(len(ELEMENTS))), "reset", *(f"s{i}" for i in range(len(ELEMENTS))))
VOCAB_SIZE = len(NAMES)


@dataclass(frozen=True, kw_only=True, eq=False)
class SwitchedS3(RowDataset):
    """A dataset for Switched-S3: rows of symbols that are operations or fillers, depending on the last switch.

    After a switch `on`, symbols are operations on a state, a permutation of three things; after `off` they are fillers,
    so that a symbol alone does not show whether it needs depth. rows: number of rows. seed, stream: row i is a function
    of (seed, stream, i); streams separate training from validation. context: tokens per row, T. Rows have int64 (T,):
    input_ids; shift_labels, the target of the logits at the same place (the state after an operation, else the symbol
    itself); labels, the same targets one place later; and difficulty, the number of operations since the last reset (-1
    for fillers and switches).
    """

    seed: int
    stream: int = 0
    context: int = ROW_LENGTH

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        input_BT = self._inputs(index_B)
        operation_BT = operations(input_BT)
        state_BT, difficulty_BT = solve(input_BT - FIRST_ELEMENT, input_BT == RESET, operation_BT)
        return aligned(input_BT, np.where(operation_BT, FIRST_STATE + state_BT, input_BT), difficulty_BT)

    def _inputs(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        kind_BT, mode_BT, what_BT, which_BT = (
            draws.uniform(self.seed, NUM_DRAWS * self.stream + draw, index_B, self.context) for draw in range(NUM_DRAWS)
        )
        switch_BT = kind_BT < SWITCH_SHARE
        switch_BT[:, 0] = True
        element_BT = FIRST_ELEMENT + (which_BT * len(ELEMENTS)).astype(np.int64)
        symbol_BT = np.where(what_BT < RESET_SHARE, RESET, element_BT)
        return np.where(switch_BT, np.where(mode_BT < ON_SHARE, ON, OFF), symbol_BT)


def operations(input_BT: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens of `SwitchedS3` rows are operations, bool (B, T).

    These are the symbols after a switch `on` and before the next `off`; switches themselves are none. input_BT: token
    ids, int64 (B, T); every row begins with a switch.
    """
    switch_BT = input_BT < FIRST_ELEMENT
    last_BT = np.maximum.accumulate(np.where(switch_BT, np.arange(input_BT.shape[1]), 0), axis=1)
    on_BT = np.take_along_axis(input_BT, last_BT, axis=1) == ON
    return on_BT & ~switch_BT
