"""The cache of one layer during generation: keys, values and mechanism state of the tokens that the layer processed.

Blocks skip tokens, so rows differ in length; each is left-aligned. Shape letters: B rows, T tokens of this call, C
columns in use, H key/value heads, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from skipstone.core.ragged_store import SLACK, RaggedStore, entries_held
from skipstone.core.row_subset import RowSubset
from skipstone.ops.reference import to_half


class SkipstoneCacheLayer(CacheLayerMixin):
    """The cache of one block, for transformers' `DynamicCache(config=...)` and `generate`.

    kv: the stored keys and values. stores: the mechanisms' own per-token state, by mechanism name. scratch: values that
    a decoding step may reuse from the previous step. window: the block's attention window in tokens; None means no
    window. Keyword arguments go to transformers' base class. cumulative_length: tokens that the model has seen,
    including those that this block skipped; the decoder advances it.
    """

    _layer_type = "skipstone"
    is_sliding = False
    is_croppable = True

    def __init__(self, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.kv = RaggedStore()
        self.stores: dict[str, RaggedStore] = {}
        self.scratch: dict[str, object] = {}  # whoever reuses a value checks that it still holds
        self.window: int | None = None  # of the block, which says so when it stores; keys beyond it are forgotten
        self.cumulative_length = 0

    def store(self, name: str) -> RaggedStore:
        """Return the store in which the mechanism `name` keeps values for each token, created on first use."""
        return self.stores.setdefault(name, RaggedStore())

    @property
    def rows(self) -> int | None:
        """The batch size of the cached tokens; None while the layer is empty."""
        return next((store.entries["slot"].shape[0] for store in self._all() if store.entries), None)

    def _all(self) -> list[RaggedStore]:
        return [self.kv, *self.stores.values()]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Record dtype and device of the first keys, `key_states`, as transformers expects; ignore `value_states`."""
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    @property
    def keys(self) -> Tensor | None:
        """All stored keys [B, heads, entries, head size], for transformers; None while there are none."""
        return self.kv.view("key").transpose(1, 2) if self.kv.width else None

    @keys.setter
    def keys(self, value: None) -> None:
        """Ignore `value`: transformers' constructor assigns None, but keys live in the attribute `kv`."""

    @property
    def values(self) -> Tensor | None:
        """All stored values [B, heads, entries, head size], for transformers; None while there are none."""
        return self.kv.view("value").transpose(1, 2) if self.kv.width else None

    @values.setter
    def values(self, value: None) -> None:
        """Ignore `value`: transformers' constructor assigns None, but values live in the attribute `kv`."""

    def as_stored(self, x: Tensor, halves: bool) -> Tensor:
        """Return keys or values in the dtype in which this layer stores them: rounded to fp16, or as they are.

        x: keys or values of any shape. halves: whether an empty layer stores what is wider than 16 bits in fp16; a
        layer that has stored something keeps to its dtype.
        """
        stored = self.kv.entries.get("key")
        rounds = halves and x.element_size() > 2 if stored is None else stored.dtype == torch.float16 != x.dtype
        return to_half(x) if rounds else x

    def append(
        self,
        key_BHTE: Tensor,
        value_BHTE: Tensor,
        slot_BT: Tensor,
        real_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        rows: RowSubset | None = None,
    ) -> None:
        """Append this call's keys `key_BHTE` and values `value_BHTE`, [B, H, T, E], leaving out padding.

        slot_BT: int64, the tokens' indices in their rows. real_BT: bool, False for padding; None means no padding.
        rows: the rows that the tokens continue, one token each; None means all. document_BT: int64, index of each
        token's document in its row; None means one document per row. Raises ValueError if some calls give documents and
        others do not.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_BHTE, value_BHTE)
        entries = {"key": key_BHTE.transpose(1, 2), "value": value_BHTE.transpose(1, 2)}
        if document_BT is not None:
            entries["document"] = document_BT.expand(key_BHTE.shape[0], -1)
        if self.kv.width and ("document" in self.kv.entries) != (document_BT is not None):
            raise ValueError("document_ids must be given in every call that shares a cache, or in none")
        self.kv.append(slot_BT, real_BT, rows, **entries)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: object,
        slot_BT: Tensor,
        real_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        rows: RowSubset | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor]:
        """Append this call's keys and values, and return all that are stored, [B, heads, entries, head size] each.

        key_states, value_states: [B, H, T, E]; what is returned has their dtype, and shares the cache's memory if this
        is the dtype of the cache. slot_BT: int64, the tokens' indices in their rows. real_BT: bool, False for padding;
        None means no padding. document_BT: int64, index of each token's document in its row; None means one document
        per row. rows: the rows that the tokens continue, one token each; None means all. Other arguments are ignored.
        Raises ValueError if some calls give documents and others do not.
        """
        self.append(key_states, value_states, slot_BT, real_BT, document_BT, rows)
        key, value = (self.kv.view(name).transpose(1, 2) for name in ("key", "value"))
        return key.to(key_states.dtype), value.to(value_states.dtype)

    def advance(self, tokens: int) -> None:
        """Count `tokens` more tokens as seen by the model, and drop entries too old for the attention window."""
        self.cumulative_length += tokens
        if self.window is not None and entries_held(self.kv.width, self.window) < self.kv.width:
            self.kv.forget(self.window + SLACK)

    def get_seq_length(self) -> int:
        """Return the number of tokens that the model has seen, including those that this block skipped."""
        return self.cumulative_length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the number of tokens in a row, and 0, the index of the first; transformers makes masks from these.

        Skipped tokens count, and so do the tokens of this call. query_length: number of the latter per row.
        """
        return self.cumulative_length + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: the cache has no maximum length."""
        return -1

    def reset(self) -> None:
        """Remove all entries and release their memory."""
        self.kv, self.stores, self.scratch, self.cumulative_length = RaggedStore(), {}, {}, 0
        self.is_initialized = False

    def crop(self, max_length: int) -> None:
        """Keep each row's first `max_length` tokens, counting padding and skipped tokens; -n removes the newest n.

        0 removes nothing. Raises ValueError if the block's attention window needs entries that were dropped before; the
        newest 64 tokens can always be removed.
        """
        length = max_length if max_length > 0 else self.cumulative_length + max_length
        if length < self.cumulative_length:
            self.kv.crop(length, self.window)
            for store in self.stores.values():
                store.crop(length)
            self.cumulative_length = max(length, 0)

    def _take(self, rows: Tensor) -> None:
        for store in self._all():
            store.take(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Reorder the rows for beam search: row i becomes the row that is now `beam_idx[i]` (int64 [B])."""
        self._take(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, each row's copies next to each other."""
        for store in self._all():
            if store.entries:
                rows = store.entries["slot"].shape[0]
                store.take(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows at `indices` (int64), in this order; drop all others."""
        self._take(indices)
