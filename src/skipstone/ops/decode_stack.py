"""Run all blocks of a decoder for a few tokens in one compiled call, instead of dozens of calls for each block.

The tokens belong to one row, or each to a row of its own.

This needs numba (`decode_stack_native.py`); `nn/block_table.py` says which blocks can be part of it.

Shape letters: B rows, T tokens of a row, N = B T tokens, L blocks, D width, G gates, S tensors that mechanisms carry
from block to block, A activations.
"""

from __future__ import annotations

import logging
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from skipstone.ops.decode_frame import CHOICE as CHOICE
from skipstone.ops.decode_frame import FED_OF as FED_OF
from skipstone.ops.decode_frame import KEYS_OF as KEYS_OF
from skipstone.ops.decode_frame import MIXTURE as MIXTURE
from skipstone.ops.decode_frame import MOST_TOKENS as MOST_TOKENS
from skipstone.ops.decode_frame import NEEDED as NEEDED
from skipstone.ops.decode_frame import OUTCOMES

MOST_THREADS = 8  # more wait for the memory, and for each other
EACH = 1 << 19  # weights of a block for which a further thread is worth its waits
ALIGNED = 64  # bytes
FUNCTIONS = ("silu", "gelu_tanh", "relu", "tanh", "gelu")
WEIGHTS = ("none", "raw", "opening", "tanh")  # functions that give the factor of a kept token
DECISIONS = ("all", "zeros", "largest")  # which neurons of an MLP are computed
MIXED = 4  # activations of a mixture
FLOATS = {torch.float32: 1, torch.bfloat16: -1, torch.float16: -2}  # what tells the dtype of weights without scales
LONG_S = 4.0  # seconds; reading from disk what has been compiled takes less
COMPILING = (
    "compiling the decoding step for this processor: ten to twenty seconds of CPU, once; it is then kept on disk"
)
WAITING = "waiting for another process, which is compiling the decoding step for this processor"
_arenas: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by address


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes and constants that all blocks which one numba call runs have in common.

    width: width of the residual stream. neurons: number of neurons in the MLP. heads: query heads. groups: key/value
    heads. head_size: features per head. eps: added to the mean square in norms. offset: added to the norms' weights.
    scaling: factor on attention scores.
    """

    width: int
    neurons: int
    heads: int
    groups: int
    head_size: int
    eps: float
    offset: float
    scaling: float

    @property
    def threads(self) -> int:
        """The number of threads, from 1 to 8, that are worth using for blocks of these sizes."""
        weights = self.width * (2 * (self.heads + self.groups) * self.head_size + 3 * self.neurons)
        return min(max(weights // EACH, 1), MOST_THREADS)


class Program(NamedTuple):
    """The description of a decoder's blocks by which one numba call runs them in a decoding step.

    sizes: what all blocks have in common. table_LC: int64, one row of addresses and counts for each of L blocks, with
    the columns of `decode_frame.py`. number_LN: fp32, two numbers for each block with a PolyGLU activation: decay, the
    factor by which its running sum shrinks at each token (negative: no sum, the token alone), and the factor on the
    neurons' preferences. gate_GC: int64, one row of addresses and options for each of G gates (depth mechanisms), with
    the columns of `decode_gates_native.py`. number_GN: fp32, the constants of each gate. hidden: the largest number of
    hidden values of a token in one gate or activation. mixes: whether any activation is a mixture. chooses: whether any
    MLP chooses which neurons it computes. int8, int4: whether any weights are int8, and whether any have four bits.
    """

    sizes: Sizes
    table_LC: Tensor
    number_LN: Tensor
    gate_GC: Tensor
    number_GN: Tensor
    hidden: int
    mixes: bool
    chooses: bool
    int8: bool
    int4: bool


class Ran(NamedTuple):
    """The results of a call of `run`; all but x_BTD and stored are None if no decisions were requested.

    x_BTD: the stream after all blocks. stored: five integers for each block: how many tokens had their keys and values
    stored; how many its MLP computed; how many neurons' up projections at least one of the latter needed; and which
    tokens were stored and which computed, as bit masks. said_FGBT: fp32, F = 4: the score, weight, loss and carried
    state after each gate (depth mechanism) for each token. flag_2GBT: bool, whether the gate kept the token, and
    whether the token reached the gate. logit_LBTA: fp32, the logits of activation mixtures, NaN for tokens that the MLP
    did not compute; empty without mixtures. fed_LBT: bool, the tokens that the MLP computed; empty if no activation is
    a mixture and no MLP chooses neurons. score_LN: fp32, the scores of the neuron groups: for a block of n groups, the
    first B T n entries are a [B, T, n] array, undefined for tokens that the MLP did not compute. mark_2LN: bool, in the
    layout of score_LN, which groups were tried and which were kept.
    """

    x_BTD: Tensor
    stored: list[list[int]]
    said_FGBT: Tensor | None = None
    flag_2GBT: Tensor | None = None
    logit_LBTA: Tensor | None = None
    fed_LBT: Tensor | None = None
    score_LN: Tensor | None = None
    mark_2LN: Tensor | None = None


def run(
    x_BTD: Tensor, program: Program, memory_LM: Tensor, slot_BT: Tensor, state_SBT: Tensor | None, recorded: bool = True
) -> Ran:
    """Run all blocks of a program for several tokens of one row, or one token of each of several rows, in one call.

    x_BTD: the stream before the blocks, fp32; B or T is 1, and B T at most `MOST_TOKENS`. program: the description of
    the blocks. memory_LM: int64, for each block the addresses and lengths of its cache, in the order of
    `decode_frame.py`. slot_BT: int64, slots of the tokens (indices in the row). state_SBT: fp32, contiguous, tensors
    that mechanisms carry from block to block, changed in place; None if there are none. recorded: whether the decisions
    of mechanisms and mixtures are returned. Returns the stream after the blocks, counts of what was stored and
    computed, and these decisions (`Ran`).
    """
    native, (B, T), s = _native(), x_BTD.shape[:2], program.sizes
    N, slot_BT = B * T, slot_BT.expand(B, T).contiguous()
    x_BTD, (L, G) = x_BTD.clone(memory_format=torch.contiguous_format), (len(program.table_LC), len(program.gate_GC))
    parts, mixes = min(native.threads(), s.threads), L if program.mixes else 0
    feeds, chooses = max(mixes, L if program.chooses else 0), L if program.chooses and recorded else 0
    outcome_LO = torch.zeros(L, OUTCOMES, dtype=torch.long)
    inner, widest = s.heads * s.head_size, max(s.width, s.neurons, s.heads * s.head_size)
    singles = N * (2 * inner + 2 * s.groups * s.head_size + 3 * s.width + 2 * s.neurons + program.hidden)
    # a list of neurons, tokens normed and rounded to int16, and factors
    private = (8 * s.neurons + 6 * N * widest + 4 * N + 127) // ALIGNED * ALIGNED
    needed = 4 * singles + parts * (private + 8 * native.FRAME) + 2 * ALIGNED
    sizes = (4 * native.FIELDS * G * N, 2 * G * N, 4 * mixes * N * MIXED, feeds * N)  # bytes of what is said
    said: tuple[Tensor, ...] | tuple[None, ...] = (None, None, None, None)
    chosen = torch.empty(chooses, N * s.neurons), torch.empty(2, chooses, N * s.neurons, dtype=torch.bool)
    if recorded:
        gates = torch.empty(native.FIELDS, G, B, T), torch.empty(2, G, B, T, dtype=torch.bool)
        said = (*gates, torch.empty(mixes, B, T, MIXED), torch.empty(feeds, B, T, dtype=torch.bool))
    work = torch.empty(needed + (0 if recorded else sum(sizes) + ALIGNED * (len(sizes) + 1)), dtype=torch.uint8)
    at, ends = -(-work.data_ptr() // ALIGNED) * ALIGNED, needed
    places = []
    for x, size in zip(said, sizes, strict=True):
        places.append(work.data_ptr() + -(-ends // ALIGNED) * ALIGNED if x is None else x.data_ptr())
        ends += -(-size // ALIGNED) * ALIGNED
    given = (program.table_LC, memory_LM, slot_BT, x_BTD, at, program.gate_GC, program.number_GN, program.number_LN)
    addresses = [x if isinstance(x, int) else x.data_ptr() for x in given]
    addresses += [0 if state_SBT is None else state_SBT.data_ptr(), *places, outcome_LO.data_ptr()]
    addresses += [x.data_ptr() if chooses else 0 for x in chosen]
    states = 0 if state_SBT is None else len(state_SBT)
    counts = (L, N, s.width, s.neurons, s.heads, s.groups, s.head_size, G, states, program.hidden, widest, private)
    constants = (s.eps, s.offset, s.scaling)
    native.share(native.crew, (addresses, (*counts, int(B > 1)), prepare(program), constants), parts)
    return Ran(x_BTD, outcome_LO.tolist(), *said, *(chosen if recorded else ()))


def prepare(program: Program) -> tuple[int, ...]:
    """Compile the functions that a program's calls need, unless they are on disk, and return their addresses.

    The addresses are in the order of `decode_stack_native.UNITS`; a function that the program does not need has the
    address 0. Compiled functions are kept on disk, usually in the folder that `kept()` returns. program: the
    description of the blocks.
    """
    return _units(program.int8, program.int4, program.mixes, program.chooses, len(program.gate_GC) > 0)


@contextmanager
def said_if_long(line: str) -> Iterator[None]:
    """Log the text `line` at the level INFO if the `with` block takes longer than four seconds."""
    timer = threading.Timer(LONG_S, logging.getLogger(__name__).info, [line])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def kept() -> Path:
    """Return the folder in which numba keeps the compiled functions, if it can be written to.

    It is the folder that the environment variable NUMBA_CACHE_DIR names, else `__pycache__` beside this file. If it
    cannot be written to, numba uses another one, such as the user's own cache folder, or keeps nothing.
    """
    return Path(os.environ.get("NUMBA_CACHE_DIR") or Path(__file__).parent / "__pycache__")


@torch.inference_mode(False)
def lay(x: Tensor, turned: bool) -> Tensor:
    """Return the matrix x, laid out in memory as its contiguous transpose if `turned`, else as a contiguous matrix.

    The shape stays the same, and x itself is returned if it already has that layout.
    """
    if turned:
        return x if x.t().is_contiguous() else x.t().contiguous().t()
    return x.contiguous()


@torch.inference_mode(False)
def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors, one after the other in memory and in large pages where the system has them.

    Reading weights in this order is up to a third faster. tensors: the tensors to copy; they are returned unchanged if
    they already lie in such memory.
    """
    ends = {start: start + arena.size for start, arena in _arenas.items()}
    if all(any(start <= x.data_ptr() < end for start, end in ends.items()) for x in tensors):
        return list(tensors)
    places, end = [], 0
    for x in tensors:
        places.append(end)
        end += -(-x.numel() * x.element_size() // ALIGNED) * ALIGNED
    arena = np.empty(end + ALIGNED, np.uint8)  # numpy asks for large pages
    start = -arena.ctypes.data % ALIGNED
    _arenas[arena.ctypes.data] = arena
    found = []
    for x, at in zip(tensors, places, strict=True):
        lying = torch.from_numpy(arena[start + at : start + at + x.numel() * x.element_size()])
        found.append(lying.view(x.dtype).view(x.shape).copy_(x))
    return found


@cache
def _native() -> Any:
    return import_module("skipstone.ops.decode_stack_native")


@cache
def _units(*needed: bool) -> tuple[int, ...]:
    """Return the addresses of a step's compiled functions, which numba compiles if they are not on disk.

    needed: the arguments of `decode_stack_native.units`. If compiling takes long, a line is logged.
    """
    with said_if_long(COMPILING):
        return _native().units(*needed)  # type: ignore[no-any-return]
