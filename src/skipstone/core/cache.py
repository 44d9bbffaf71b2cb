"""What generation remembers of a layer: keys, values and mechanism state of the tokens that the layer really processed.

Rows differ in length, because blocks skip tokens: every row is left-aligned with its own length.
Shape letters: B rows, T tokens of this call, C columns in use, H key/value heads, E head size.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

EMPTY = 2**62  # slot of an unused column: no query's slot reaches it, so causality masks it by itself
GROWTH = 64  # columns added at a time, at least


class Store:
    """Append-only entries of each row: named tensors [B, columns, ...] with the slot of each entry.

    `lengths_B` is None while all rows are equally long, which is then known without looking at a tensor.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Tensor] = {}
        self.width = 0
        self.lengths_B: Tensor | None = None

    def append(self, slot_BT: Tensor, real_BT: Tensor | None, **entries: Tensor) -> None:
        """Add the tokens of one call; those that are not real are left out. Slots of a row ascend from call to call."""
        rows = max(x.shape[0] for x in entries.values())
        entries["slot"] = slot_BT.expand(rows, -1)
        if any(map(_not_ours_alone, (*self.entries.values(), *entries.values()))):
            self.entries = {name: value.clone() for name, value in self.entries.items()}
            self.lengths_B = None if self.lengths_B is None else self.lengths_B.clone()
        if real_BT is None and self.lengths_B is None:
            self._reserve(self.width + slot_BT.shape[1], entries)
            for name, new in entries.items():
                self.entries[name][:, self.width : self.width + new.shape[1]] = new
            self.width += slot_BT.shape[1]
        else:
            self._append_ragged(real_BT, entries)

    def _append_ragged(self, real_BT: Tensor | None, entries: dict[str, Tensor]) -> None:
        slot_BT = entries["slot"]
        real_BT = torch.ones_like(slot_BT, dtype=torch.bool) if real_BT is None else real_BT.expand_as(slot_BT)
        before_B = self.row_lengths(slot_BT.shape[0], slot_BT.device)
        if slot_BT.shape[1] == 1:
            self._append_one(before_B, real_BT, entries)
            return
        self.lengths_B = before_B + real_BT.sum(1)
        width = int(self.lengths_B.max())  # a host sync, like `nonzero` below: rows of their own length cost two
        self._reserve(width, entries)
        row, at = real_BT.nonzero(as_tuple=True)
        column = (before_B[:, None] + real_BT.cumsum(1) - 1)[row, at]
        for name, new in entries.items():
            self.entries[name][row, column] = new[row, at].to(self.entries[name].dtype)
        self.width = width

    def _append_one(self, before_B: Tensor, real_B1: Tensor, entries: dict[str, Tensor]) -> None:
        """Decoding: every row writes into its next column; what is not real stays EMPTY and is overwritten later."""
        self._reserve(self.width + 1, entries)
        row_B = torch.arange(before_B.shape[0], device=before_B.device)
        entries["slot"] = torch.where(real_B1, entries["slot"], EMPTY)
        for name, new in entries.items():
            self.entries[name][row_B, before_B] = new[:, 0].to(self.entries[name].dtype)
        self.lengths_B = before_B + real_B1[:, 0]
        self.width = int(self.lengths_B.max())  # a host sync

    def _reserve(self, width: int, like: dict[str, Tensor]) -> None:
        for name, new in like.items():
            have = self.entries.get(name)
            if have is None:
                fill = EMPTY if name == "slot" else 0
                self.entries[name] = new.new_full((new.shape[0], max(width, 1), *new.shape[2:]), fill)
            elif have.shape[1] < width:
                extra = max(width - have.shape[1], GROWTH, have.shape[1] // 2)
                pad = (0, 0) * (have.dim() - 2) + (0, extra)
                self.entries[name] = F.pad(have, pad, value=EMPTY if name == "slot" else 0)

    def row_lengths(self, rows: int, device: torch.device) -> Tensor:
        """int64 [B], the number of entries of each row."""
        if self.lengths_B is not None:
            return self.lengths_B
        return torch.full((rows,), self.width, dtype=torch.long, device=device)

    def view(self, name: str) -> Tensor:
        """[B, C, ...] of the columns in use; columns beyond a row's length hold EMPTY slots."""
        return self.entries[name][:, : self.width]

    def last(self, name: str) -> Tensor | None:
        """[B, ...] each row's newest entry, zeros where a row has none; None before the first append."""
        if name not in self.entries or self.width == 0:
            return None
        value = self.entries[name]
        if self.lengths_B is None:
            return value[:, self.width - 1]
        newest = value[torch.arange(value.shape[0], device=value.device), (self.lengths_B - 1).clamp(min=0)]
        has = (self.lengths_B > 0).view(-1, *[1] * (newest.dim() - 1))
        return torch.where(has, newest, torch.zeros_like(newest))

    def crop(self, slots: int) -> None:
        """Forget entries of slot >= `slots`."""
        if not self.entries:
            return
        self.entries["slot"] = torch.where(self.entries["slot"] < slots, self.entries["slot"], EMPTY)
        self._settle()

    def take(self, rows: Tensor) -> None:
        """Keep these rows, in this order (beam search, batch select and repeat)."""
        self.entries = {name: value.index_select(0, rows.to(value.device)) for name, value in self.entries.items()}
        if self.entries:
            self._settle()

    def _settle(self) -> None:
        lengths_B = (self.entries["slot"] < EMPTY).sum(1)
        self.width = int(lengths_B.max()) if lengths_B.numel() else 0
        even = bool((lengths_B == self.width).all())
        self.lengths_B = None if even else lengths_B

    def stored(self) -> int:
        """Number of entries held, over all rows."""
        if not self.entries:
            return 0
        rows = self.entries["slot"].shape[0]
        return rows * self.width if self.lengths_B is None else int(self.lengths_B.sum())

    def bytes(self, allocated: bool = False) -> int:
        """Bytes of the entries held (slots included), or of all that is allocated."""
        if allocated:
            return sum(x.numel() * x.element_size() for x in self.entries.values())
        return self.stored() * sum(x[0, 0].numel() * x.element_size() for x in self.entries.values())


def _not_ours_alone(x: Tensor) -> bool:
    """Whether writing in place would spoil what a backward pass has saved, or is forbidden outside inference mode."""
    return x.requires_grad or (x.is_inference() and not torch.is_inference_mode_enabled())


class SkipstoneCacheLayer(CacheLayerMixin):
    """The cache of one block, for transformers' `DynamicCache(config=...)` and `generate`.

    `kv` holds keys and values; `stores` holds what mechanisms keep, by their name. `cumulative_length` counts tokens
    that the model has seen, also those that this block skipped; the decoder advances it.
    """

    _layer_type = "skipstone"
    is_sliding = False
    is_croppable = True

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kv = Store()
        self.stores: dict[str, Store] = {}
        self.cumulative_length = 0

    def store(self, name: str) -> Store:
        return self.stores.setdefault(name, Store())

    def _all(self) -> list[Store]:
        return [self.kv, *self.stores.values()]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,
        slot_BT: Tensor,
        real_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values [B, H, T, E] of the real tokens; returns all that are stored, [B, H, C, E]."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        entries = {"key": key_states.transpose(1, 2), "value": value_states.transpose(1, 2)}
        if document_BT is not None:
            entries["document"] = document_BT.expand(key_states.shape[0], -1)
        if self.kv.width and ("document" in self.kv.entries) != (document_BT is not None):
            raise ValueError("document_ids must be given in every call that shares a cache, or in none")
        self.kv.append(slot_BT, real_BT, **entries)
        self.keys, self.values = self.kv.view("key").transpose(1, 2), self.kv.view("value").transpose(1, 2)
        return self.keys, self.values

    def advance(self, tokens: int) -> None:
        """Count tokens that the model has seen."""
        self.cumulative_length += tokens

    def get_seq_length(self) -> int:
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.kv, self.stores, self.cumulative_length = Store(), {}, 0
        self.keys = self.values = None  # type: ignore[assignment]  # as transformers declares them
        self.is_initialized = False

    def crop(self, max_length: int) -> None:
        """Forget as many of the newest slots as a negative number says, or all but the first `max_length`; 0: none."""
        length = max_length if max_length > 0 else self.cumulative_length + max_length
        if length < self.cumulative_length:
            for store in self._all():
                store.crop(length)
            self.cumulative_length = max(length, 0)

    def _take(self, rows: Tensor) -> None:
        for store in self._all():
            store.take(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        for store in self._all():
            if store.entries:
                rows = store.entries["slot"].shape[0]
                store.take(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)
