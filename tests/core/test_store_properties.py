"""Property tests of a layer's cache with mechanism stores, compared with plain lists, by transformers' methods."""

from __future__ import annotations

from typing import NamedTuple

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.ragged_store import EMPTY, RaggedStore
from skipstone.core.static import SkipstoneStaticCacheLayer

H, E, R, MOST = 2, 3, 4, 40


class Entry(NamedTuple):
    slot: int
    document: int
    key: list[list[float]]  # [H, E]
    total: list[float]  # [R]


class Lists:
    """The specification: each row a list of its entries; keys are also the values, negated."""

    def __init__(self, rows: int, documents: bool, seed: int) -> None:
        self.rows: list[list[Entry]] = [[] for _ in range(rows)]
        self.seen, self.documents = 0, documents
        self.generator = torch.Generator().manual_seed(seed)

    def random(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator)

    def append(self, layer: SkipstoneCacheLayer, T: int, share: float | None) -> None:
        """T tokens of which this share is stored; None: all, and the layer knows it without looking."""
        B = len(self.rows)
        key, total = self.random(B, H, T, E), self.random(B, T, R)
        slot = (torch.arange(T) + self.seen)[None]
        document = self.random(B, T).mul(3).long() if self.documents else None
        real = None if share is None else self.random(B, T) < share
        layer.update(key, -key, slot_BT=slot, real_BT=real, document_BT=document)
        layer.store("sums").append(slot, real, total=total)
        layer.advance(T)
        for b in range(B):
            for t in range(T):
                if real is None or real[b, t]:
                    d = 0 if document is None else int(document[b, t])
                    self.rows[b].append(Entry(self.seen + t, d, key[b, :, t].tolist(), total[b, t].tolist()))
        self.seen += T

    def crop(self, layer: SkipstoneCacheLayer, n: int, absolute: bool) -> None:
        keep = n % (self.seen + 1) if absolute else max(self.seen - n, 0)
        if keep or not absolute:  # 0 does not mean "keep none" but "remove none"
            layer.crop(keep if absolute else -n)
            self.rows, self.seen = [[e for e in row if e.slot < keep] for row in self.rows], keep

    def move(self, layer: SkipstoneCacheLayer, name: str, n: int) -> None:
        B = len(self.rows)
        rows = torch.arange(B).repeat_interleave(2)
        if name == "repeat" and 2 * B <= 6:
            layer.batch_repeat_interleave(2)
        elif name == "reorder":
            rows = self.random(B).mul(B).long()
            layer.reorder_cache(rows)
        else:
            rows = self.random(1 + n % 3).mul(B).long()
            layer.batch_select_indices(rows)
        self.rows = [list(self.rows[i]) for i in rows.tolist()]

    def check(self, layer: SkipstoneCacheLayer) -> None:
        assert int(layer.get_seq_length()) == self.seen
        counts = [len(row) for row in self.rows]
        for store in (layer.kv, layer.store("sums")):
            assert store.stored() == sum(counts)
            if store.width:
                assert store.row_lengths(len(counts), torch.device("cpu")).tolist() == counts
                self.check_slots(store.view("slot"))
                each = sum(x[0, 0].numel() * x.element_size() for x in store.entries.values())
                assert store.bytes() == sum(counts) * each <= store.bytes(allocated=True)
        if not layer.kv.width:
            return
        for b, row in enumerate(self.rows):
            held = {name: layer.kv.view(name)[b, : len(row)].tolist() for name in layer.kv.entries}
            assert held["key"] == [e.key for e in row]
            assert held["value"] == [(-torch.tensor(e.key)).tolist() for e in row]
            assert not self.documents or held["document"] == [e.document for e in row]
            assert layer.store("sums").view("total")[b, : len(row)].tolist() == [e.total for e in row]
        self.check_last(layer.store("sums"))

    def check_slots(self, slot_BC: Tensor) -> None:
        """Each row left-aligned; behind it nothing that any query could see."""
        C = slot_BC.shape[1]
        assert slot_BC.tolist() == [[e.slot for e in row] + [EMPTY] * (C - len(row)) for row in self.rows]

    def check_last(self, store: RaggedStore) -> None:
        last = store.last("total")
        if last is None:
            assert not any(self.rows)
        else:
            assert last.tolist() == [row[-1].total if row else [0.0] * R for row in self.rows]


ACTS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["all", "some", "none"]), st.integers(1, 6)),
        st.tuples(st.sampled_from(["all", "some"]), st.just(1)),
        st.tuples(st.sampled_from(["crop", "remove", "reorder", "select", "repeat", "reset"]), st.integers(0, 9)),
    ),
    min_size=1,
    max_size=12,
)
SHARES = {"all": None, "some": 0.5, "none": 0.0}


@settings(max_examples=2 * settings().max_examples)
@given(ACTS, st.integers(1, 3), st.booleans(), st.booleans(), st.integers(0, 10_000))
def test_any_history_of_a_layer_equals_lists(
    acts: list[tuple[str, int]], rows: int, documents: bool, fixed: bool, seed: int
) -> None:
    layer = SkipstoneStaticCacheLayer(max_cache_len=MOST + 12) if fixed else SkipstoneCacheLayer()
    lists = Lists(rows, documents, seed)
    for name, n in acts:
        if name in SHARES:
            lists.append(layer, min(n, MOST - lists.seen) or 1, SHARES[name])
        elif name in ("crop", "remove"):
            lists.crop(layer, n, name == "crop")
        elif name == "reset":
            layer.reset()
            lists = Lists(1 + n % 3, documents, seed)
        elif layer.kv.entries:
            lists.move(layer, name, n)
        lists.check(layer)
