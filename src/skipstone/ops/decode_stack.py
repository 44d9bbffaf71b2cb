"""All blocks of a plain decoder for a few tokens of one row, in one call instead of dozens for each block.

With numba installed (`decode_stack_native.py`); `nn/stack.py` says which decoders are plain.

Shape letters: L blocks, T tokens, D width, F neurons, H query heads, G key/value heads, E head size.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

MOST_TOKENS = 8
MOST_THREADS = 8  # more wait for the memory, and for each other
EACH = 1 << 19  # weights of a block for which a further thread is worth its waits
ALIGNED = 64  # bytes
_arenas: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()  # by address


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes that all blocks have in common, and what is constant in them.

    function: of the MLP. offset: what is added to the weights of norms.
    """

    width: int
    neurons: int
    heads: int
    groups: int
    head_size: int
    function: str
    eps: float
    offset: float
    scaling: float

    @property
    def threads(self) -> int:
        """Return how many threads a block is worth."""
        weights = self.width * (2 * (self.heads + self.groups) * self.head_size + 3 * self.neurons)
        return min(max(weights // EACH, 1), MOST_THREADS)


def run(x_1TD: Tensor, table_LC: Tensor, memory: Sequence[int], slot_1T: Tensor, column: int, sizes: Sizes) -> Tensor:
    """Return the stream after all blocks, [1, T, D].

    table_LC: int64, the addresses of all weights as `decode_stack_native` lists them. memory: for each block, the
    addresses of its stored keys, values and slots and of cos and sin. column: the first new one of the cache.
    """
    native, T, s = _native(), x_1TD.shape[1], sizes
    x_1TD = x_1TD.clone()
    memory_LM = torch.tensor(memory)
    parts = min(native.threads(), s.threads)
    inner, widest = s.heads * s.head_size, max(s.width, s.neurons, s.heads * s.head_size)
    singles = T * (2 * inner + 2 * s.groups * s.head_size + s.width + 2 * s.neurons)
    work = torch.empty(4 * singles + parts * native.private(T, widest) + ALIGNED, dtype=torch.uint8)
    at = -(-work.data_ptr() // ALIGNED) * ALIGNED
    addresses = (table_LC.data_ptr(), memory_LM.data_ptr(), slot_1T.data_ptr(), x_1TD.data_ptr(), at)
    function = native.FUNCTIONS.index(s.function)
    counts = (len(table_LC), T, s.width, s.neurons, s.heads, s.groups, s.head_size, column, function)
    native.share(native.crew, (addresses, counts, (s.eps, s.offset, s.scaling)), parts)
    return x_1TD


@torch.inference_mode(False)
def gather(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return copies of tensors that lie one after the other in memory, in large pages where the system has them.

    Reading them in this order is up to a third faster. Tensors that lie so already are returned as they are.
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
