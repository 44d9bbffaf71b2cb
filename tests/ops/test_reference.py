"""Gathering, scattering, rotating and mixing agree with their definitions."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from skipstone.ops.reference import ACTIVATIONS, added, compact, gather_rows, mix_activations, rotate, scatter_rows


def masks() -> st.SearchStrategy[Tensor]:
    shapes = st.tuples(st.integers(1, 3), st.integers(1, 9))
    return shapes.flatmap(
        lambda s: st.lists(st.lists(st.booleans(), min_size=s[1], max_size=s[1]), min_size=s[0], max_size=s[0])
    ).map(torch.tensor)


@given(masks(), st.sampled_from([(), (2,), (2, 3)]))
def test_scatter_undoes_gather(kept: Tensor, rest: tuple[int, ...]) -> None:
    B, T = kept.shape
    width = int(kept.sum(1).max())
    index, x = compact(kept, width), torch.randn(B, T, *rest)
    y = gather_rows(x, index)
    assert y.shape == (B, width, *rest)
    for b in range(B):
        own = kept[b].nonzero().flatten().tolist()
        assert index[b, : len(own)].tolist() == own  # in order of slot, the kept ones first
        assert len(set(index[b].tolist())) == width
        for k in range(width):
            assert torch.equal(y[b, k], x[b, index[b, k]])
    back = scatter_rows(y, index, T, fill=-7.0)
    inside = torch.zeros(B, T, dtype=torch.bool).scatter(1, index, True)
    assert torch.equal(back[inside], x[inside])
    assert (back[~inside] == -7).all()


def test_rows_that_agree_are_expanded() -> None:
    position = torch.arange(5)[None]
    index = torch.tensor([[0, 4], [1, 2]])
    assert gather_rows(position, index).tolist() == [[0, 4], [1, 2]]


def test_gathering_nothing() -> None:
    x, index = torch.randn(2, 4, 3), torch.empty(2, 0, dtype=torch.long)
    assert gather_rows(x, index).shape == (2, 0, 3)
    assert (scatter_rows(gather_rows(x, index), index, 4) == 0).all()


def test_gradients_of_gather_and_scatter() -> None:
    index = torch.tensor([[0, 2], [3, 1]])
    x = torch.randn(2, 4, 2, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: scatter_rows(gather_rows(x, index) ** 2, index, 4), x)


def test_scattering_keeps_type_and_poison_out() -> None:
    index = torch.tensor([[1]])
    for dtype in (torch.bfloat16, torch.bool, torch.long):
        assert scatter_rows(torch.ones(1, 1, dtype=dtype), index, 3, False).tolist() == [[0, 1, 0]]
    assert scatter_rows(torch.ones(1, 1), index, 3, float("nan")).isnan().tolist() == [[True, False, True]]


def test_rotation_is_a_complex_product() -> None:
    x, angle = torch.randn(2, 3, 5, 8), torch.randn(2, 5, 4)
    both = torch.cat((angle, angle), -1)
    got = rotate(x, both.cos(), torch.cat((-angle.sin(), angle.sin()), -1))
    z = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(got, torch.cat((z.real, z.imag), -1))
    torch.testing.assert_close(got.norm(dim=-1), x.norm(dim=-1))


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("steps", [1, 5])
def test_mix_is_the_weighted_sum(rows: int, steps: int) -> None:
    gate, static, dynamic = torch.randn(2, 5, 7), torch.randn(rows, 7, 4), torch.randn(2, steps, 4)
    share = ((static[:, None] + dynamic[:, :, None]) / 0.3).softmax(-1)
    expected = torch.stack([gate.relu(), gate.tanh(), F.silu(gate), F.gelu(gate)], -1) * share
    torch.testing.assert_close(mix_activations(gate, static, dynamic, 0.3), expected.sum(-1))
    assert len(ACTIVATIONS) == 4


@pytest.mark.parametrize("stream", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("update", [torch.float32, torch.bfloat16])
def test_added_is_a_sum_of_the_same_type_and_value(stream: torch.dtype, update: torch.dtype) -> None:
    x, y = torch.randn(3, 4).to(stream), torch.randn(3, 4).to(update)
    assert torch.equal(added(x, y), x + y)
    assert added(x, y).dtype == (x + y).dtype
