"""The ragged store of the cache, compared with plain lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipstone.core.ragged_store import EMPTY, RaggedStore
from skipstone.core.row_subset import RowSubset


class Lists:
    """The specification: each row a list of (slot, value)."""

    def __init__(self, rows: int) -> None:
        self.rows: list[list[tuple[int, float]]] = [[] for _ in range(rows)]

    def append(self, slot: Tensor, value: Tensor, real: Tensor | None) -> None:
        for r, row in enumerate(self.rows):
            for t in range(slot.shape[1]):
                if real is None or bool(real[r, t]):
                    row.append((int(slot[0, t]), float(value[r, t, 0])))

    def check(self, store: RaggedStore) -> None:
        counts = [len(row) for row in self.rows]
        assert store.stored() == sum(counts)
        if not store.entries:
            return
        assert store.width == max(counts)
        slots, values, last = store.view("slot"), store.view("value"), store.last("value")
        for r, row in enumerate(self.rows):
            assert slots[r].tolist() == [s for s, _ in row] + [EMPTY] * (store.width - len(row))
            assert values[r, : len(row), 0].tolist() == [v for _, v in row]
            if last is not None:
                assert last[r, 0].item() == (row[-1][1] if row else 0.0)
        assert store.row_lengths(len(counts), torch.device("cpu")).tolist() == counts
        assert (store.lengths is None) == (len(set(counts)) == 1)


ACTS = st.lists(
    st.one_of(
        st.tuples(st.just("even"), st.integers(1, 5)),
        st.tuples(st.just("ragged"), st.integers(1, 5)),
        st.tuples(st.just("none"), st.integers(1, 3)),
        st.tuples(st.just("rows"), st.integers(1, 1)),
        st.tuples(st.just("crop"), st.integers(0, 8)),
        st.tuples(st.just("take"), st.integers(1, 4)),
    ),
    min_size=1,
    max_size=9,
)


@given(ACTS, st.integers(1, 3), st.integers(0, 10_000))
def test_any_history_equals_lists(acts: list[tuple[str, int]], rows: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    store, lists, slot = RaggedStore(), Lists(rows), 0
    for act, n in acts:
        rows = len(lists.rows)
        if act == "crop":
            slot = max(slot - n, 0)
            store.crop(slot)
            lists.rows = [[e for e in row if e[0] < slot] for row in lists.rows]
        elif act == "take":
            chosen = torch.randint(0, rows, (n,), generator=generator)
            if store.entries:
                store.take(chosen)
                lists.rows = [list(lists.rows[i]) for i in chosen.tolist()]
        else:
            at, value = (torch.arange(n) + slot)[None], torch.rand(rows, n, 2, generator=generator)
            real = None
            if act != "even":
                real = torch.rand(rows, n, generator=generator) < (0.0 if act == "none" else 0.5)
            some = RowSubset.from_mask(real[:, 0]) if act == "rows" else None
            if some is None or len(some.at) in (0, rows):
                store.append(at, real, value=value)
            else:
                store.append(at, None, some, value=some.gather(value))
            lists.append(at, value, real)
            slot += n
        lists.check(store)


def test_it_grows_in_steps_and_tells_its_size() -> None:
    store = RaggedStore()
    store.append(torch.arange(3)[None], None, value=torch.zeros(2, 3, 4))
    assert store.bytes() == 2 * 3 * (4 * 4 + 8)
    held = [store.entries["value"].data_ptr()]
    for i in range(100):
        store.append(torch.tensor([[3 + i]]), None, value=torch.zeros(2, 1, 4))
        held.append(store.entries["value"].data_ptr())
    assert store.width == 103
    assert len(set(held)) <= 5  # copied a few times, not at every token
    assert store.bytes(allocated=True) >= store.bytes() == 2 * 103 * 24


def test_nothing_before_the_first_token() -> None:
    store = RaggedStore()
    assert store.last("value") is None
    assert store.stored() == store.bytes() == 0
    store.crop(0)
    store.take(torch.tensor([0]))
    store.append(torch.zeros(1, 1, dtype=torch.long), torch.zeros(2, 1, dtype=torch.bool), value=torch.ones(2, 1, 1))
    assert store.last("value") is None
    assert store.stored() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_types_are_kept(dtype: torch.dtype) -> None:
    store = RaggedStore()
    real = torch.tensor([[True, False], [True, True]])
    store.append(torch.arange(2)[None], real, value=torch.ones(2, 2, 1, dtype=dtype))
    assert store.view("value").dtype == dtype
    assert store.view("slot").dtype == torch.int64


def test_a_tensor_that_comes_later_is_as_wide_as_the_others() -> None:
    """Documents may be given for the first time when everything has been cropped away."""
    store = RaggedStore()
    store.append(torch.arange(70)[None], None, value=torch.ones(1, 70, 1))
    store.crop(0)
    for slot in range(3):
        at = torch.tensor([[slot]])
        store.append(at, None, value=torch.ones(1, 1, 1), document=at)
    assert store.view("document").tolist() == [[0, 1, 2]]


def test_an_empty_store_makes_as_much_room_as_it_is_asked_for() -> None:
    store = RaggedStore()
    store.reserve(100, {"value": (2,)}, rows=3)
    assert store.entries["value"].shape == (3, 100, 2)
    assert store.entries["slot"].shape == (3, 100)
