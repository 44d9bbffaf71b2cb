"""The addresses of a cache's entries, for compiled decoding steps that write into them (`nn/compiled_run.py`).

Shape letters: L blocks, M columns of the table of addresses.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.core.cache import RaggedStore
from skipstone.ops import decode_step

NAMES, SUMS = ("key", "value", "slot"), ("sum", "slot")
COLUMN, TURNED, SUM_COLUMN = 3, slice(4, 6), 8  # in `ops/decode_frame.py`


class Places:
    """The memory addresses of the cache entries of several blocks, for compiled code that appends to them.

    of: the `CompiledRun` that made this object; no other may use it. kv: for each block, the store of keys, values and
    slots (indices in the row). sums: for each block, the store of the running sums of its activation mechanism, or
    None. A deep copy or pickle of this object is None, because the entries of a copied cache lie elsewhere.
    """

    def __init__(self, of: object, kv: Sequence[RaggedStore], sums: Sequence[RaggedStore | None]) -> None:
        self.of, self.kv, self.sums = of, kv, sums
        self.summed = [store for store in sums if store is not None]
        self.stores = [*kv, *self.summed]
        self.dicts = [store.entries for store in self.stores]
        names = [NAMES] * len(kv) + [SUMS] * len(self.summed)
        pairs = [(entries, name) for entries, each in zip(self.dicts, names, strict=True) for name in each]
        self.entries, self.keys = [entries for entries, _ in pairs], [name for _, name in pairs]
        self.values = [entries[name] for entries, name in pairs]
        self.room = [min(entries["slot"].shape[1], decode_step.MOST_KEYS) for entries in self.dicts]
        rows = []
        for store, more in zip(kv, sums, strict=True):
            row = [store.entries[name].data_ptr() for name in NAMES]
            own = (0, 0) if more is None else [more.entries[name].data_ptr() for name in SUMS]
            rows.append([*row, 0, 0, 0, *own, 0])
        self.table_LM = torch.tensor(rows)

    def __deepcopy__(self, memo: object) -> None:
        return None

    def __reduce__(self) -> tuple[type[Any], tuple[()]]:
        return type(None), ()

    def holds(self, count: int) -> bool:
        """Return whether all entries still lie at the recorded addresses, with room for `count` more tokens."""
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
        columns = [(store.width, *angles) for store, angles in zip(self.kv, turned, strict=True)]
        self.table_LM[:, COLUMN : TURNED.stop] = torch.tensor(columns)
        if self.summed:
            self.table_LM[:, SUM_COLUMN] = torch.tensor([0 if store is None else store.width for store in self.sums])
        return self.table_LM

    def grow(self, stored: Sequence[Sequence[int]]) -> None:
        """Add the tokens of a step to the lengths of the stores.

        stored: for each block, the number of tokens whose keys and values compiled code has appended, and the number of
        tokens whose running sums (of the activation mechanism) it has appended; further numbers are ignored.
        """
        for store, more, (given, seen, *_) in zip(self.kv, self.sums, stored, strict=True):
            store.width += given
            if more is not None:
                more.width += seen


def is_usual(store: Any, entries: int, new: int) -> bool:
    """Return whether the compiled attention can read and extend a cache store.

    The store must hold one row of at most 1024 tokens (`decode_step.MOST_KEYS`), including the `new` tokens to come.
    store: any store of a cache layer. entries: the number of tensors that it should consist of, fp32 and int64, if it
    holds anything yet.
    """
    if type(store) is not RaggedStore or store.width + new > decode_step.MOST_KEYS:
        return False
    if store.lengths is not None or store.forgotten is not None:
        return False
    return not store.entries or (
        len(store.entries) == entries
        and all(x.dtype in (torch.float32, torch.long) and not x.requires_grad for x in store.entries.values())
        and len(store.entries["slot"]) == 1
    )
