"""Reset-S3: a synthetic task in which the depth that each token needs is known.

A row is T entries (128 by default). Each is, independently, a filler (probability 3/4, uniform over 16 symbols) or an
operation; an operation is a reset with probability 1/16, else a uniform element of S3, the six permutations of three
things. The state starts as the identity; a reset sets it to the identity, an element g to state * g. The label of
an operation is the state after it, the label of a filler is the filler. The state itself is not an input.

Ids: 0..15 fillers, 16..21 elements, 22 reset, 23..28 states (labels only): a vocabulary of 29.
`difficulty` is the number of operations since the last reset, or since the start of the row: the reset itself 0, the
first operation after it 1 (also one that begins a row); a filler has -1. S3 does not commute, so the product has to
be computed through all of them.

Targets are aligned with the inputs, not shifted: `shift_labels[t]` is the target of the logits at t (Hugging Face's
name for labels that need no shift). `labels` holds the same targets one place later, for code that counts or shifts
`labels` (the target of the last position is in `shift_labels` alone).
Shapes: B rows, T entries per row.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from skipstone.data import draws
from skipstone.data.rows import IGNORE, Batch, RowDataset

if TYPE_CHECKING:
    from numpy.typing import ArrayLike, NDArray

NUM_FILLERS = 16
FILLER_SHARE = 0.75
RESET_SHARE = 1 / 16  # share of operations that are resets
ROW_LENGTH = 128

ELEMENTS = tuple(itertools.permutations(range(3)))  # ELEMENTS[0] is the identity
FIRST_ELEMENT = NUM_FILLERS
RESET = FIRST_ELEMENT + len(ELEMENTS)
FIRST_STATE = RESET + 1
VOCAB_SIZE = FIRST_STATE + len(ELEMENTS)

BINS: dict[str, tuple[int, int | None]] = {"0-3": (0, 3), "4-7": (4, 7), "8-15": (8, 15), "16+": (16, None)}


def _multiply() -> NDArray[np.int64]:
    """Return the multiplication table (6, 6): entry [a, b] is the index of a * b, the permutation x -> a[b[x]]."""
    table = [[ELEMENTS.index(tuple(a[b[x]] for x in range(3))) for b in ELEMENTS] for a in ELEMENTS]
    return np.array(table, np.int64)


MULTIPLY = _multiply()


@dataclass(frozen=True, kw_only=True, eq=False)
class ResetS3(RowDataset):
    """A dataset for Reset-S3: rows of fillers, and of operations on a state (a permutation of three things).

    An operation's label is the state after it; a filler's label is the filler itself. rows: number of rows. seed: the
    seed from which rows are drawn. stream: separates training from validation rows; row i is a function of (seed,
    stream, i). context: tokens per row, T. Rows have int64 (T,): input_ids; shift_labels, the target of the logits at
    the same place; labels, the same targets one place later; and difficulty, the number of operations since the last
    reset (-1 for fillers), which is the depth that a token needs.
    """

    seed: int
    stream: int = 0
    context: int = ROW_LENGTH

    def batch(self, index_B: NDArray[np.int64]) -> Batch:
        input_BT = self._inputs(index_B)
        operation_BT, reset_BT = oracle_keep(input_BT), input_BT == RESET
        state_BT, difficulty_BT = solve(input_BT - FIRST_ELEMENT, reset_BT, operation_BT)
        return aligned(input_BT, np.where(operation_BT, FIRST_STATE + state_BT, input_BT), difficulty_BT)

    def _inputs(self, index_B: NDArray[np.int64]) -> NDArray[np.int64]:
        kind_BT, what_BT, which_BT = (
            draws.uniform(self.seed, 3 * self.stream + draw, index_B, self.context) for draw in range(3)
        )
        filler_BT = (which_BT * NUM_FILLERS).astype(np.int64)
        element_BT = FIRST_ELEMENT + (which_BT * len(ELEMENTS)).astype(np.int64)
        operation_BT = np.where(what_BT < RESET_SHARE, RESET, element_BT)
        return np.where(kind_BT < FILLER_SHARE, filler_BT, operation_BT)


def solve(
    element_BT: NDArray[np.int64], reset_BT: NDArray[np.bool_], operation_BT: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the state of Reset-S3 after each token, and the token's difficulty, int64 (B, T) each.

    The state is a permutation of three things, as an index (0 to 5) into ELEMENTS, the tuple of all six. element_BT:
    the permutation that each token applies, also an index, used only for operations other than resets. reset_BT: bool,
    which tokens are resets. operation_BT: bool, which tokens are operations, resets included; all others change nothing
    and have difficulty -1. A reset returns to the identity, index 0, with which rows also begin. Difficulty counts the
    operations since the last reset or the start of the row; a reset's own is 0.
    """
    states_BT, difficulty_BT = np.zeros_like(element_BT), np.full_like(element_BT, -1)
    state_B, since_B = np.zeros(len(element_BT), np.int64), np.zeros(len(element_BT), np.int64)
    for t, (operation_B, reset_B) in enumerate(zip(operation_BT.T, (operation_BT & reset_BT).T, strict=True)):
        element_B = np.where(operation_B & ~reset_B, element_BT[:, t], 0)  # 0, the identity, changes nothing
        state_B = np.where(reset_B, 0, MULTIPLY[state_B, element_B])
        since_B = np.where(reset_B, 0, since_B + operation_B)
        states_BT[:, t] = state_B
        difficulty_BT[operation_B, t] = since_B[operation_B]
    return states_BT, difficulty_BT


def aligned(input_BT: NDArray[np.int64], target_BT: NDArray[np.int64], difficulty_BT: NDArray[np.int64]) -> Batch:
    """Return rows with these ids, targets and difficulties as a dict of int64 arrays (B, T).

    Its keys are input_ids, shift_labels, labels and difficulty. input_BT: token ids. target_BT: for each place the
    target of the logits there; these become shift_labels, and labels has them one place later, as models that shift
    labels expect, and begins with -100. difficulty_BT: the tokens' difficulties, numbers of operations on which
    they depend; -1 for fillers.
    """
    labels_BT = np.full_like(target_BT, IGNORE)
    labels_BT[:, 1:] = target_BT[:, :-1]
    return {"input_ids": input_BT, "shift_labels": target_BT, "labels": labels_BT, "difficulty": difficulty_BT}


def oracle_keep(input_ids: NDArray[np.int64]) -> NDArray[np.bool_]:
    """Return which tokens of `ResetS3` are operations and therefore need depth: bool, shaped like the ids.

    input_ids: an array or tensor of ids.
    """
    return (input_ids >= FIRST_ELEMENT) & (input_ids <= RESET)


def accuracy_by_bin(predictions: ArrayLike, labels: ArrayLike, difficulty: ArrayLike) -> dict[str, float]:
    """Return the share of correct predictions by bin of difficulty; the bins are "0-3", "4-7", "8-15" and "16+".

    Difficulty is the number of operations since the last reset. An empty bin has nan. predictions, labels, difficulty:
    integer arrays or CPU tensors of one shape; predictions at t are the argmax of the logits at t, and labels are
    `shift_labels`. Fillers (difficulty -1) are in no bin. Raises ValueError for different shapes.
    """
    predictions, labels, difficulty = np.asarray(predictions), np.asarray(labels), np.asarray(difficulty)
    if not predictions.shape == labels.shape == difficulty.shape:  # those of one entry would be stretched to the others
        raise ValueError(
            f"predictions {predictions.shape}, labels {labels.shape} and difficulty {difficulty.shape} must have one "
            "shape"
        )
    right = predictions == labels
    inside = {name: (difficulty >= low) & (difficulty <= (high or math.inf)) for name, (low, high) in BINS.items()}
    return {name: float(right[mask].mean()) if mask.any() else math.nan for name, mask in inside.items()}
