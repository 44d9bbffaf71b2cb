"""The addresses of a cache's entries, for decoding by numba code that writes into them (`nn/compiled_run.py`).

Shape letters: B rows, L blocks, M columns of the table of addresses.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.core.ragged_store import RaggedStore
from skipstone.ops.decode_frame import COS, FED_OF, FED_TOKENS, GIVEN_KEYS, KEYS_OF, LENGTHS, MEMORY, SIN, SUM_LENGTHS

NAMES, SUMS = ("key", "value", "slot"), ("sum", "slot")


class Places:
    """The memory addresses of the cache entries of several blocks, for compiled code that appends to them.

    of: the `CompiledRun` that made this object; no other may use it. kv: for each block, the store of keys, values and
    slots (indices in the row). sums: for each block, the store of the running sums of its activation mechanism, or
    None. windows: the attention window of each block, 0 without. A deep copy or pickle of this object is None, because
    the entries of a copied cache lie elsewhere.
    """

    def __init__(
        self, of: object, kv: Sequence[RaggedStore], sums: Sequence[RaggedStore | None], windows: Sequence[int]
    ) -> None:
        self.of, self.kv, self.sums = of, kv, sums
        self.summed = [store for store in sums if store is not None]
        self.stores = [*kv, *self.summed]
        self.dicts = [store.entries for store in self.stores]
        names = [NAMES] * len(kv) + [SUMS] * len(self.summed)
        pairs = [(entries, name) for entries, each in zip(self.dicts, names, strict=True) for name in each]
        self.entries, self.keys = [entries for entries, _ in pairs], [name for _, name in pairs]
        self.values = [entries[name] for entries, name in pairs]
        self.room = [entries["slot"].shape[1] for entries in self.dicts]
        self.rows = len(kv[0].entries["slot"])
        table = []
        for store, more, window in zip(kv, sums, windows, strict=True):
            line = [store.entries[name].data_ptr() for name in NAMES] + [0, 0]
            line += (0, 0) if more is None else [more.entries[name].data_ptr() for name in SUMS]
            line += [store.entries["slot"].shape[1], 0 if more is None else more.entries["slot"].shape[1], window]
            line.append(store.entries["key"].element_size())
            table.append(line + [0] * (MEMORY - len(line)))
        with torch.inference_mode(False):  # a later step outside of inference mode writes lengths into it
            self.table_LM = torch.tensor(table)

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[Any], tuple[()]]:
        return type(None), ()

    def holds(self, count: int) -> bool:
        """Return whether all entries still lie at the recorded addresses, with room for `count` more tokens per row."""
        return (
            all(map(operator.is_, [store.entries for store in self.stores], self.dicts))
            and all(map(operator.is_, map(dict.get, self.entries, self.keys), self.values))
            and all(map(operator.le, [store.width + count for store in self.stores], self.room))
        )

    def memory(self, turned: Sequence[Sequence[int]]) -> Tensor:
        """Return the table of the stores' addresses and current lengths, int64 [L, M] for L blocks and M columns.

        turned: for each block, the addresses of the cosines and sines of its rotary angles.
        `ops/decode_frame.py` lists the columns.
        """
        self.table_LM[:, COS : SIN + 1] = torch.tensor(turned)
        self.table_LM[:, LENGTHS : LENGTHS + self.rows] = torch.tensor([self._lengths(store) for store in self.kv])
        if self.summed:
            lengths = [self._lengths(store) for store in self.sums]
            self.table_LM[:, SUM_LENGTHS : SUM_LENGTHS + self.rows] = torch.tensor(lengths)
        return self.table_LM

    def _lengths(self, store: RaggedStore | None) -> list[int]:
        if store is None:
            return [0] * self.rows
        return store.lengths or [store.width] * self.rows

    def grow(self, stored: Sequence[Sequence[int]]) -> None:
        """Add the tokens of a step to the lengths of the stores.

        stored: for each block, the numbers that the compiled call returned (`decode_frame.OUTCOMES` lists them), among
        them the count of tokens whose keys and values were appended, the count of those whose running sums (of the
        activation mechanism) were, and for each count the rows of these tokens: bit b of a number is set for row b.
        """
        for store, more, said in zip(self.kv, self.sums, stored, strict=True):
            self._grow(store, said[GIVEN_KEYS], said[KEYS_OF])
            if more is not None:
                self._grow(more, said[FED_TOKENS], said[FED_OF])

    def _grow(self, store: RaggedStore, count: int, which: int) -> None:
        """Count new entries of a store. count: their number. which: the rows that got one, as bits, if several."""
        if self.rows == 1:
            store.width += count
        elif count:
            store.lengthen([which >> row & 1 for row in range(self.rows)])


def is_usual(
    store: Any, like: Mapping[str, tuple[int, ...]], rows: int, dtypes: Sequence[torch.dtype] = (torch.float32,)
) -> bool:
    """Return whether the compiled attention can read and extend a cache store.

    store: any store of a cache layer; an empty `RaggedStore` always passes. like: the shape of one entry in each tensor
    that a filled store must have beside the int64 slots (indices in the row), by tensor name. rows: the number of rows
    that a filled store must have. dtypes: those of which all of these tensors must have one.
    """
    if type(store) is not RaggedStore:
        return False
    if not store.entries:
        return True
    shapes = {**like, "slot": ()}
    dtype = next((store.entries[name].dtype for name in like if name in store.entries), dtypes[0])
    return (
        dtype in dtypes
        and store.entries.keys() == shapes.keys()
        and all(
            x.shape[0] == rows
            and x.shape[2:] == shapes[name]
            and x.dtype == (torch.long if name == "slot" else dtype)
            and not x.requires_grad
            for name, x in store.entries.items()
        )
    )
