"""A cache of fixed size for compiled steps and CUDA graphs: no tensor in it changes its shape or address.

transformers' `StaticCache(config=model.config, max_cache_len=...)` is made of these layers. Every block gets columns
for `max_cache_len` tokens, even one that will skip most of them, because decisions without later tokens guarantee no
upper bound. Writing needs no host sync (the CPU never waits for the GPU); unused columns have the slot (index in the
row) EMPTY, which no query attends to.

Shape letters: B rows, T tokens of this call, C columns, H key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import StaticLayer

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.ragged_store import EMPTY, RaggedStore
from skipstone.core.row_subset import RowSubset


class StaticStore(RaggedStore):
    """A store with memory for C columns per row, allocated at the first call, filled from the left and never moved.

    columns: C, the number of columns. An additional column 0 is never read: padding is written there, so that every
    call writes the same number of entries. lengths_B: int64, number of entries of each row, on the device. width: 0
    before the first call, then C.
    """

    lengths_B: Tensor

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def append(self, slot_BT: Tensor, real_BT: Tensor | None, rows: RowSubset | None = None, **entries: Tensor) -> None:
        """Append the tokens of one call, without padding, to all rows.

        slot_BT: int64, index of each token in its row, ascending from call to call. real_BT: bool, False for padding;
        None means no padding. rows: must be None. entries: tensors [B, T, ...] by name. Raises ValueError if a row is
        full, the batch has another number of rows than before, or an entry needs gradients.
        """
        assert rows is None
        if any(x.requires_grad for x in entries.values()):
            raise ValueError(
                "a static cache is written in place and cannot be differentiated through; call the model under "
                "torch.no_grad(), or use DynamicCache(config=model.config)"
            )
        given = max(x.shape[0] for x in entries.values())
        entries["slot"] = slot_BT.expand(given, -1)
        self._allocate(entries)
        column_BT = self._columns(slot_BT.shape[1], real_BT)
        row_B1 = torch.arange(given, device=slot_BT.device)[:, None]
        try:
            for name, new in entries.items():
                self.entries[name][row_B1, column_BT] = new.to(self.entries[name].dtype)
        except IndexError:
            raise ValueError(
                f"a row of the cache holds {self.columns} tokens and the call brings more; "
                "build the cache with a larger max_cache_len"
            ) from None
        self.lengths_B.add_(slot_BT.shape[1] if real_BT is None else real_BT.sum(1))

    def _columns(self, T: int, real_BT: Tensor | None) -> Tensor:
        """Return the column that each token is written to, int64 [B, T]; 0 for padding.

        T: tokens of the call. real_BT: bool, False for padding, or None.
        """
        before_B1 = self.lengths_B[:, None]
        if real_BT is None:
            return before_B1 + torch.arange(1, T + 1, device=before_B1.device)
        return torch.where(real_BT, before_B1 + real_BT.cumsum(1), 0)

    def _allocate(self, like: dict[str, Tensor]) -> None:
        """Allocate the tensors at the first call, or reuse those of an earlier prompt if shapes and dtypes are equal.

        like: tensors [B, T, ...] of the call, by name. Raises ValueError if the cache holds another number of rows.
        """
        rows, device = like["slot"].shape[0], like["slot"].device
        if self.width:
            if rows != self.lengths_B.shape[0]:
                raise ValueError(f"the cache holds {self.lengths_B.shape[0]} rows, but the call has {rows}")
            return
        self.width = self.columns
        shapes = {name: (rows, self.columns + 1, *new.shape[2:]) for name, new in like.items()}
        kinds = {name: (shapes[name], new.dtype, new.device) for name, new in like.items()}
        if kinds == {name: (x.shape, x.dtype, x.device) for name, x in self.entries.items()}:
            return  # reuse the tensors of an earlier prompt, so that addresses stay
        self.entries = {name: _buffer(shapes[name], new, EMPTY if name == "slot" else 0) for name, new in like.items()}
        self.lengths_B = _buffer((rows,), torch.empty(0, dtype=torch.long, device=device), 0)

    def row_lengths(self, rows: int, device: torch.device) -> Tensor:
        return self.lengths_B if self.width else torch.zeros(rows, dtype=torch.long, device=device)

    def even(self, rows: RowSubset | None = None) -> bool:
        """Return False, whatever `rows`: views include unused columns, so rows never count as equally filled."""
        return False

    def view(self, name: str, rows: RowSubset | None = None, newest: int | None = None) -> Tensor:
        """Return all C columns of the tensor `name`, [B, C, ...], without copying; no query attends to the unused ones.

        `newest` is ignored and `rows` must be None, because attention windows are applied by masks only.
        """
        assert rows is None
        return self.entries[name][:, 1 : self.width + 1]

    def last(self, name: str, rows: RowSubset | None = None) -> Tensor | None:
        assert rows is None
        if not self.width or name not in self.entries:
            return None
        value = self.entries[name]
        newest = value[torch.arange(value.shape[0], device=value.device), self.lengths_B]
        has = (self.lengths_B > 0).view(-1, *[1] * (newest.dim() - 1))
        return torch.where(has, newest, torch.zeros_like(newest))

    def crop(self, slots: int, window: int | None = None) -> None:
        if self.width:
            slot_BC = self.entries["slot"]
            slot_BC.masked_fill_(slot_BC >= slots, EMPTY)
            self.lengths_B.copy_((self.view("slot") < EMPTY).sum(1))

    def take(self, rows: Tensor) -> None:
        """Keep the rows at the indices `rows` (int64), in this order; indices may repeat, as in beam search.

        If the number of rows stays the same, tensors are changed in place, else replaced.
        """
        if not self.width:
            return
        taken = {name: value.index_select(0, rows.to(value.device)) for name, value in self.entries.items()}
        lengths_B = self.lengths_B.index_select(0, rows.to(self.lengths_B.device))
        if len(rows) == len(self.lengths_B):
            for name, value in taken.items():
                self.entries[name].copy_(value)
            self.lengths_B.copy_(lengths_B)
        else:
            self.entries = {name: _buffer(tuple(x.shape), x, 0).copy_(x) for name, x in taken.items()}
            self.lengths_B = _buffer(tuple(lengths_B.shape), lengths_B, 0).copy_(lengths_B)

    def empty(self) -> None:
        """Remove all entries but keep the memory for the next prompt."""
        if self.width:
            for name, value in self.entries.items():
                value.fill_(EMPTY if name == "slot" else 0)
            self.lengths_B.zero_()
            self.width = 0

    def stored(self) -> int:
        return int(self.lengths_B.sum()) if self.width else 0


def _buffer(shape: tuple[int, ...], like: Tensor, fill: int) -> Tensor:
    """Return a new tensor of this shape, filled with `fill`, which may be written later outside of inference mode, too.

    like: a tensor with its dtype and device.
    """
    if torch.compiler.is_compiling():  # the calls below cannot be traced; a first call should not be compiled
        return like.new_full(shape, fill)
    with torch.inference_mode(False):
        buffer = torch.full(shape, fill, dtype=like.dtype, device=like.device)
    torch._dynamo.mark_static_address(buffer)
    return buffer


class SkipstoneStaticCacheLayer(SkipstoneCacheLayer, StaticLayer):
    """The fixed-size cache of one block, for compiled decoding steps.

    transformers builds one per block in `StaticCache(config=model.config, max_cache_len=...)`. max_cache_len: the
    largest number of tokens per row. Other keyword arguments go to transformers. cumulative_length: number of token
    positions per row that the model has seen, padding included and the same for all rows: an int64 scalar tensor on the
    device, so that a compiled step does not depend on its value.
    """

    is_compileable = True
    cumulative_length: Tensor  # type: ignore[assignment]  # an int in the parent class

    def __init__(self, max_cache_len: int, **kwargs: object) -> None:
        super().__init__(max_cache_len=max_cache_len, **kwargs)
        self.kv = StaticStore(max_cache_len)
        self.cumulative_length = _buffer((), torch.empty(0, dtype=torch.long), 0)

    def store(self, name: str) -> RaggedStore:
        return self.stores.setdefault(name, StaticStore(self.max_cache_len))

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        if self.cumulative_length.device != key_states.device:
            self.cumulative_length = _buffer((), key_states.new_zeros((), dtype=torch.long), 0)

    def advance(self, tokens: int) -> None:
        self.cumulative_length.add_(tokens)

    def get_seq_length(self) -> Tensor | int:  # type: ignore[override]
        """Return the number of tokens seen by the model: 0 before the first call, then an int64 scalar tensor."""
        return self.cumulative_length if self.is_initialized else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.max_cache_len, 0

    def get_max_length(self) -> int:
        return self.max_cache_len

    def crop(self, max_length: int) -> None:
        """Keep each row's first `max_length` tokens, counting padding and skipped tokens; -n removes the newest n.

        0 removes nothing. The CPU waits for the GPU once.
        """
        seen = int(self.cumulative_length)
        length = max(max_length if max_length > 0 else seen + max_length, 0)
        if length < seen:
            for store in self._all():
                store.crop(length)
            self.cumulative_length.fill_(length)

    def reset(self) -> None:
        """Empty the cache but keep the memory for the next prompt."""
        for store in self._all():
            assert isinstance(store, StaticStore)
            store.empty()
        self.cumulative_length.zero_()
        self.is_initialized = False
