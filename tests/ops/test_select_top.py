"""`select_top` agrees with a simple loop; rounding of quotas."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipstone.ops.reference import quota, select_top

CAPACITIES = st.sampled_from([0.01, 0.125, 0.2, 0.25, 0.29, 0.3, 1 / 3, 0.333333, 0.5, 0.6, 0.7, 0.9, 0.99, 1.0])


def naive(score: list[list[float]], capacity: float, group: list[list[int]]) -> list[list[bool]]:
    kept = [[False] * len(row) for row in score]
    for r, (values, documents) in enumerate(zip(score, group, strict=True)):
        for document in {d for d in documents if d >= 0}:
            members = [t for t, d in enumerate(documents) if d == document]
            best = sorted(members, key=lambda t: (-values[t], t))
            for t in best[: quota(capacity, len(members))]:
                kept[r][t] = True
    return kept


@st.composite
def rows(draw: st.DrawFn) -> tuple[list[list[float]], list[list[int]]]:
    """Scores of few values, so that most tie; documents in any order, -1 for padding."""
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    score = st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 3.0]), min_size=T, max_size=T)
    group = st.lists(st.integers(-1, 3), min_size=T, max_size=T)
    return draw(st.lists(score, min_size=B, max_size=B)), draw(st.lists(group, min_size=B, max_size=B))


@given(rows(), CAPACITIES)
def test_documents_padding_and_ties(drawn: tuple[list[list[float]], list[list[int]]], capacity: float) -> None:
    score, group = drawn
    got = select_top(torch.tensor(score), capacity, torch.tensor(group))
    assert got.tolist() == naive(score, capacity, group)


@given(rows(), CAPACITIES)
def test_without_documents_the_row_is_one(drawn: tuple[list[list[float]], list[list[int]]], capacity: float) -> None:
    score = drawn[0]
    expected = naive(score, capacity, [[0] * len(row) for row in score])
    assert select_top(torch.tensor(score), capacity).tolist() == expected
    one = torch.zeros(1, len(score[0]), dtype=torch.long)  # documents that all rows share
    assert select_top(torch.tensor(score), capacity, one).tolist() == expected


@given(st.integers(1, 3), st.integers(1, 64), CAPACITIES, st.integers(0, 1000))
def test_bfloat16_ties_never_keep_too_many(rows: int, length: int, capacity: float, seed: int) -> None:
    score = torch.randn(rows, length, generator=torch.Generator().manual_seed(seed)).bfloat16()
    assert (select_top(score, capacity).sum(1) == quota(capacity, length)).all()


@given(st.integers(1, 400), st.integers(0, 5000))
def test_quota_is_the_floor_of_the_decimal_product(hundredths: int, length: int) -> None:
    """0.29 * 100 is below 29 in floating point; the quota follows what was written."""
    capacity = min(hundredths, 100) / 100
    assert quota(capacity, length) == math.floor(Fraction(min(hundredths, 100), 100) * length)


def test_quota_of_small_lengths() -> None:
    assert [quota(0.125, n) for n in (0, 1, 7, 8, 15, 16)] == [0, 0, 0, 1, 1, 2]
    assert quota(1.0, 17) == 17


def test_order_of_scores_is_the_only_thing_that_counts() -> None:
    score = torch.tensor([[0.1, -5.0, 7.0, 7.0, float("-inf"), 2.0]])
    assert select_top(score, 0.5).tolist() == [[False, False, True, True, False, True]]


@pytest.mark.parametrize("capacity", [0.125, 0.333333, 0.5])
def test_quotas_of_documents_fit_the_quota_of_the_row(capacity: float) -> None:
    """The executor gathers a number of columns known beforehand: no division into documents may need more."""

    def fits(group: Tensor) -> bool:
        kept = select_top(torch.zeros(1, group.numel()), capacity, group[None])
        return int(kept.sum()) <= quota(capacity, group.numel())

    for size in range(1, 13):
        assert fits(torch.arange(240) // size)
