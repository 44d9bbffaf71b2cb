"""`RaggedStore`: an append-only store of one layer's per-token tensors, whose rows may have different lengths.

Blocks skip tokens, so the rows of a batch differ in length; each is left-aligned. Shape letters: B rows, T tokens of
this call, C columns in use, H key/value heads, E head size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.row_subset import RowSubset
from skipstone.ops.reference import gather_rows

EMPTY = 2**62  # slot of an unused column: no query's slot reaches it, so causality masks it by itself
GROWTH = 64  # columns added at a time, at least
SLACK = 64  # entries kept beyond a window, so that as many tokens can be cropped; and added before the next forgetting


def entries_held(entries: float, window: int | None) -> float:
    """Return how many of a row's `entries` a cache keeps: `window` + 64 if they exceed `window` + 128, else all.

    window: the block's attention window in tokens; None means that there is none, and all entries are kept.
    """
    return entries if window is None or entries <= window + 2 * SLACK else window + SLACK


class RaggedStore:
    """Append-only storage for rows of different lengths: named tensors [B, C, ...], one column per entry.

    entries: the tensors by name; "slot" holds the index of each entry's token in its row. lengths: number of entries of
    each row, on the CPU; None means that every row has `width` entries. width: number of entries of the longest row.
    forgotten: number of oldest entries that each row has dropped; None means that none were. Methods with an argument
    `rows` read or write these rows only; their tensors then have as many rows.
    """

    def __init__(self) -> None:
        self.entries: dict[str, Tensor] = {}
        self.width = 0
        self.lengths: list[int] | None = None
        self.forgotten: list[int] | None = None

    def append(self, slot_BT: Tensor, real_BT: Tensor | None, rows: RowSubset | None = None, **entries: Tensor) -> None:
        """Append the tokens of one call to their rows, leaving out padding.

        slot_BT: int64, ascending indices of the tokens in their rows. real_BT: bool, False for padding; None means no
        padding. rows: the rows that the tokens continue, one token each; None means all. entries: tensors [B, T, ...]
        by name.
        """
        given = max(x.shape[0] for x in entries.values())
        entries["slot"] = slot_BT if slot_BT.shape[0] == given else slot_BT.expand(given, -1)
        if _not_ours_alone([*self.entries.values(), *entries.values()]):
            self.entries = {name: value.clone() for name, value in self.entries.items()}
        if rows is None and real_BT is None and self.lengths is None:
            before, self.width = self.width, self.width + slot_BT.shape[1]
            self._reserve(self.width, entries, given)
            for name, new in entries.items():
                self.entries[name][:, before : self.width] = new
        elif slot_BT.shape[1] == 1:
            self._append_one(real_BT, rows, entries)
        else:
            assert rows is None
            self._append_ragged(real_BT, entries)

    def reserve(
        self, count: int, like: Mapping[str, tuple[int, ...]], rows: int = 1, dtype: torch.dtype = torch.float32
    ) -> None:
        """Make room for `count` more entries in each row, which the caller writes.

        The caller then counts them, by adding to `width` if all rows have the same length, else by `lengthen`. like:
        the shape of one entry in each tensor, by tensor name. rows, dtype: the number of rows and the dtype of the
        tensors. These three are used only if the store is still empty.
        """
        if not self.entries:
            room = max(count, GROWTH)
            self.entries = {name: torch.zeros(rows, room, *shape, dtype=dtype) for name, shape in like.items()}
            self.entries["slot"] = torch.full((rows, room), EMPTY)
        elif self.entries["slot"].shape[1] < self.width + count:
            self._reserve(self.width + count, self.entries, len(self.entries["slot"]))

    def lengthen(self, more: list[int]) -> None:
        """Count entries that the caller has written behind the last one of each row. more: how many, for each row."""
        lengths = [self.width] * len(more) if self.lengths is None else self.lengths
        self._settle([a + b for a, b in zip(lengths, more, strict=True)])

    def new_columns(self, count: int = 1) -> int:
        """Add `count` columns to every row for the caller to fill, and return the index of the first.

        All rows must have the same length, at least 1.
        """
        assert self.lengths is None
        if self.entries["slot"].shape[1] < self.width + count:
            self._reserve(self.width + count, self.entries, len(self.entries["slot"]))
        self.width += count
        return self.width - count

    def _append_ragged(self, real_BT: Tensor | None, entries: dict[str, Tensor]) -> None:
        """Append different numbers of tokens to the rows; arguments as in `append`, with "slot" among the entries."""
        slot_BT = entries["slot"]
        real_BT = torch.ones_like(slot_BT, dtype=torch.bool) if real_BT is None else real_BT.expand_as(slot_BT)
        before_B = self.row_lengths(slot_BT.shape[0], slot_BT.device)
        row, at = real_BT.nonzero(as_tuple=True)  # the host waits here, and for the lengths
        lengths = (before_B + real_BT.sum(1)).tolist()
        self._reserve(max(lengths), entries, len(lengths))
        column = (before_B[:, None] + real_BT.cumsum(1) - 1)[row, at]
        source, place = row * slot_BT.shape[1] + at, row * self.entries["slot"].shape[1] + column
        for name, new in entries.items():
            given = new.flatten(0, 1).index_select(0, source)
            _flat(self.entries[name]).index_copy_(0, place, given.to(self.entries[name].dtype))
        self._settle(lengths)

    def _append_one(self, real_B1: Tensor | None, rows: RowSubset | None, entries: dict[str, Tensor]) -> None:
        """Append at most one token to each row, as in decoding; arguments as in `append`, "slot" among the entries."""
        given = entries["slot"].shape[0]
        if real_B1 is not None:
            real = RowSubset.from_mask(real_B1[:, 0].expand(given))  # the host waits here
            entries, rows = {name: real.gather(new) for name, new in entries.items()}, real.within(rows)
        total = given if rows is None else rows.total
        at = range(total) if rows is None else rows.at
        lengths = [self.width] * total if self.lengths is None else self.lengths.copy()
        self._reserve(max((lengths[b] + 1 for b in at), default=0), entries, total)
        place_R = self._places([(b, lengths[b]) for b in at])
        for b in at:
            lengths[b] += 1
        for name, new in entries.items() if at else ():
            _flat(self.entries[name]).index_copy_(0, place_R, new[:, 0].to(self.entries[name].dtype))
        self._settle(lengths)

    def _reserve(self, width: int, like: dict[str, Tensor], total: int) -> None:
        """Make room for `width` columns in `total` rows, with the trailing axes and dtypes of the tensors in `like`."""
        room = self.entries["slot"].shape[1] if self.entries else 0
        if like.keys() <= self.entries.keys() and room >= width:  # all are equally wide
            return
        if room < width:
            room += max(width - room, GROWTH, room // 2) if room else width
        for name, new in like.items():
            have, fill = self.entries.get(name), EMPTY if name == "slot" else 0
            if have is None:  # as wide as the others, also if these are there already
                self.entries[name] = new.new_full((total, max(room, 1), *new.shape[2:]), fill)
            elif have.shape[1] < room:
                pad = (0, 0) * (have.dim() - 2) + (0, room - have.shape[1])
                self.entries[name] = F.pad(have, pad, value=fill)

    def _settle(self, lengths: list[int]) -> None:
        """Set `lengths` and `width` from the number of entries of each row."""
        self.width = max(lengths, default=0)
        self.lengths = None if min(lengths, default=0) == self.width else lengths

    def _places(self, at: list[tuple[int, int]]) -> Tensor:
        """Return the int64 indices of the (row, column) pairs `at` in entries with their first two axes flattened."""
        slot = self.entries["slot"]
        return torch.tensor([row * slot.shape[1] + column for row, column in at], device=slot.device)

    def row_lengths(self, rows: int, device: torch.device) -> Tensor:
        """Return the number of entries of each row, int64 [B], on `device`. rows: the batch size, B."""
        if self.lengths is not None:
            return torch.tensor(self.lengths, device=device)
        return torch.full((rows,), self.width, dtype=torch.long, device=device)

    def even(self, rows: RowSubset | None = None) -> bool:
        """Return whether the rows have equally many entries, so that a view of them has no unused column.

        rows: the rows to compare; None means all.
        """
        if self.lengths is None or (rows is not None and len(rows.at) == 1):
            return True
        return rows is not None and len({self.lengths[b] for b in rows.at}) == 1

    def view(self, name: str, rows: RowSubset | None = None, newest: int | None = None) -> Tensor:
        """Return the stored entries of tensor `name`, [B, C, ...], C being the number of entries of the longest row.

        Shorter rows end in unused columns, which the tensor "slot" (each entry's token index) marks with EMPTY, 2^62.
        name: a key of `entries`. rows: the rows to return; None means all. newest: return at most this many of the
        newest entries of each row; None means all entries. The result is only to be read: unless rows or columns have
        to be picked, it shares the store's memory.
        """
        longest = self.width
        if rows is not None and self.lengths is not None:
            longest = max(self.lengths[b] for b in rows.at)
        if newest is None or longest <= newest:
            part = self.entries[name][:, :longest]
            return part if rows is None else rows.gather(part)
        if self.even(rows):
            part = self.entries[name][:, longest - newest : longest]
            return part if rows is None else rows.gather(part)
        value = self.entries[name] if rows is None else rows.gather(self.entries[name])
        lengths = self.lengths or []
        first = [max(length - newest, 0) for length in (lengths if rows is None else [lengths[b] for b in rows.at])]
        first_B1 = torch.tensor(first, device=value.device)[:, None]
        return gather_rows(value, first_B1 + torch.arange(newest, device=value.device))

    def forget(self, keep: int) -> None:
        """Drop all but the newest `keep` entries of each row, without waiting for the GPU."""
        if self.width <= keep:
            return
        slot = self.entries["slot"]
        lengths = [self.width] * slot.shape[0] if self.lengths is None else self.lengths
        dropped = [max(length - keep, 0) for length in lengths]
        if self.lengths is None:
            self.entries = {
                name: value[:, self.width - keep : self.width].clone() for name, value in self.entries.items()
            }
        else:
            first_B1 = torch.tensor(dropped, device=slot.device)[:, None]
            column_BK = first_B1 + torch.arange(keep, device=slot.device)
            self.entries = {name: gather_rows(value, column_BK) for name, value in self.entries.items()}
        self.forgotten = [a + b for a, b in zip(self.forgotten or [0] * len(dropped), dropped, strict=True)]
        self._settle([min(length, keep) for length in lengths])

    def last(self, name: str, rows: RowSubset | None = None) -> Tensor | None:
        """Return the newest entry of the tensor `name` in each row, [B, ...]; None if nothing was appended yet.

        rows: the rows to read; None means all. A row without entries gets 0.
        """
        if name not in self.entries or self.width == 0:
            return None
        value = self.entries[name]
        if self.lengths is None:
            newest = value[:, self.width - 1]
            return newest if rows is None else rows.gather(newest)
        at = range(len(self.lengths)) if rows is None else rows.at
        newest = value.flatten(0, 1).index_select(0, self._places([(b, max(self.lengths[b] - 1, 0)) for b in at]))
        if all(self.lengths[b] for b in at):
            return newest
        has = torch.tensor([self.lengths[b] > 0 for b in at], device=value.device)
        return torch.where(has.view(-1, *[1] * (newest.dim() - 1)), newest, torch.zeros_like(newest))

    def crop(self, slots: int, window: int | None = None) -> None:
        """Keep each row's tokens up to index `slots` - 1, counting skipped ones and padding.

        window: the block's attention window in tokens; None means no window. Raises ValueError if the window needs
        entries that were dropped before.
        """
        if not self.entries:
            return
        stays = self.entries["slot"] < slots
        lengths = stays.sum(1).tolist()
        if self.forgotten is not None and slots > 0:
            pairs = zip(lengths, self.forgotten, strict=True)
            if window is not None and any(dropped and left < window - 1 for left, dropped in pairs):
                raise ValueError(
                    f"the cache cannot be cropped to {slots} tokens: a block with a window of {window} has dropped "
                    f"entries that it would need; the last {SLACK} tokens can always be removed"
                )
        self.entries["slot"] = torch.where(stays, self.entries["slot"], EMPTY)
        self.forgotten = self.forgotten if slots > 0 else None
        self._settle(lengths)

    def take(self, rows: Tensor) -> None:
        """Keep the rows at the indices `rows` (int64), in this order; indices may repeat, as in beam search."""
        self.entries = {name: value.index_select(0, rows.to(value.device)) for name, value in self.entries.items()}
        if self.lengths is not None:
            self._settle([self.lengths[b] for b in rows.tolist()])
        if self.forgotten is not None:
            self.forgotten = [self.forgotten[b] for b in rows.tolist()]

    def stored(self) -> int:
        """Return the number of entries over all rows."""
        if not self.entries:
            return 0
        return self.entries["slot"].shape[0] * self.width if self.lengths is None else sum(self.lengths)

    def bytes(self, allocated: bool = False) -> int:
        """Return the bytes of all entries and their tokens' indices; if `allocated`, of all memory, used or not."""
        if allocated:
            return sum(x.numel() * x.element_size() for x in self.entries.values())
        return self.stored() * sum(x[0, 0].numel() * x.element_size() for x in self.entries.values())


def _flat(x: Tensor) -> Tensor:
    """Return a view [B C, ...] of x [B, C, ...]; `flatten` may copy, and writes into the copy would be lost."""
    return x.view(-1, *x.shape[2:])


def _not_ours_alone(tensors: list[Tensor]) -> bool:
    """Return whether in-place writes to `tensors` would corrupt a backward pass's memory or break inference mode."""
    if any(x.requires_grad for x in tensors):
        return True
    return not torch.is_inference_mode_enabled() and any(x.is_inference() for x in tensors)
