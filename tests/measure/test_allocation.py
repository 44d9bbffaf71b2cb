"""Groups of tokens and partial correlations, on numbers whose result is known."""

from __future__ import annotations

import pytest
import torch

from skipstone.measure.allocation import measure_allocation
from skipstone.measure.token_trace import Allocation, TokenGroup

B, T = 16, 64


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(compute_BT: torch.Tensor, loss_BT: torch.Tensor, ids_BT: torch.Tensor | None = None) -> Allocation:
    ids = torch.randint(0, 9, (B, T), generator=torch.Generator().manual_seed(3)) if ids_BT is None else ids_BT
    return measure_allocation(compute_BT, loss_BT, ids, torch.ones(B, T, dtype=torch.bool), None)


def test_a_router_that_follows_position_alone_is_found_out() -> None:
    position_BT = (torch.arange(T) // 8).expand(B, T).float()
    one = found(position_BT, position_BT + random(0, B, T))
    assert one.correlation is not None
    assert one.correlation > 0.8
    assert one.without_position is None, "nothing is left of compute"
    other = found(position_BT + random(1, B, T), position_BT + random(0, B, T))
    assert other.correlation is not None
    assert other.without_position is not None
    assert other.correlation > 0.5 > 0.1 > abs(other.without_position)


def test_a_router_that_follows_difficulty_keeps_its_correlation() -> None:
    ids_BT = torch.randint(0, 9, (B, T), generator=torch.Generator().manual_seed(3))
    hard_BT = random(2, B, T)
    compute_BT = hard_BT + ids_BT * 3 + torch.arange(T) // 8
    one = found(compute_BT, hard_BT, ids_BT)
    assert one.without_both is not None
    assert one.correlation is not None
    assert one.without_both > 0.95 > one.correlation, "position and token hid it"


def test_groups_cover_all_tokens_and_the_frequent_ones_come_first() -> None:
    ids_BT = torch.tensor([[0] * 4 + [1] * 2 + [2, 3]])
    compute_BT = torch.tensor([[0.0] * 4 + [0.5] * 2 + [1.0, 1.0]])
    loss_BT = torch.tensor([[1.0, 1, 1, 1, 2, 2, 3, float("nan")]])
    real_BT = torch.ones(1, 8, dtype=torch.bool)
    one = measure_allocation(compute_BT, loss_BT, ids_BT, real_BT, torch.tensor([[0] * 6 + [2, 3]]))
    assert [group.tokens for group in one.by_kind] == [6, 1, 1]
    assert [group.name for group in one.by_kind] == ["letters", "signs", "white space"]
    assert one.by_frequency[0] == TokenGroup(name="second quarter", tokens=4, compute=0.0, loss=1.0)
    assert one.by_frequency[-1].compute == 1.0
    assert one.by_kind[-1].loss is None
    assert [group.name for group in one.by_position][:2] == ["0 to 0", "1 to 1"]
    assert sum(group.tokens for group in one.by_position) == 8
    assert (
        Allocation.from_dict(
            {
                **vars(one),
                "by_kind": [vars(g) for g in one.by_kind],
                **{name: [vars(g) for g in getattr(one, name)] for name in ("by_frequency", "by_position")},
            }
        )
        == one
    )


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_dense_model_has_nothing_to_correlate(value: float) -> None:
    assert found(torch.full((B, T), value), random(0, B, T)).correlation is None


def test_a_text_without_a_single_prediction_has_no_correlations() -> None:
    one = measure_allocation(
        torch.ones(1, 1), torch.full((1, 1), torch.nan), torch.zeros(1, 1).long(), torch.ones(1, 1).bool(), None
    )
    assert (one.correlation, one.without_position, one.without_token, one.without_both) == (None,) * 4
