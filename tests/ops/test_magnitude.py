"""One token's partial MLP, with rows read in place or copied, equals the full MLP with the other neurons set to 0."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from skipstone.ops import magnitude
from skipstone.ops.magnitude import MagnitudeOutput, MagnitudeWeights, largest, sizes

WIDTH, NEURONS = 37, 96  # one that no vector register divides


@pytest.fixture(params=["in place", "copied"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "in place":
        pytest.importorskip("numba")
    else:
        monkeypatch.setattr(magnitude, "_kernels", lambda: None)
    return request.param  # type: ignore[no-any-return]


def given(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """x, a, typical, up and down by neuron."""
    torch.manual_seed(0)
    x, a = torch.randn(1, 1, WIDTH), F.silu(torch.randn(1, 1, NEURONS))
    up, down = (torch.randn(NEURONS, WIDTH) * 0.2 for _ in range(2))
    return x.to(dtype), a.to(dtype), torch.rand(NEURONS) + 0.5, up.to(dtype), down.to(dtype)


def one_token(x: torch.Tensor, a: torch.Tensor, *weights: torch.Tensor, **counts: int) -> MagnitudeOutput:
    return magnitude.one_token(x, a, MagnitudeWeights(*weights, **counts))


def specified(*given: torch.Tensor, tried: int, kept: int, size: int) -> MagnitudeOutput:
    x, a, typical, up, down = given
    score = sizes(a, size, typical)
    tried_11G = largest(score, tried)
    h = a * F.linear(x, up) * tried_11G.repeat_interleave(size, -1)
    kept_11G = largest(sizes(h, size), kept)
    return MagnitudeOutput(F.linear(h * kept_11G.repeat_interleave(size, -1), down.t()), score, tried_11G, kept_11G)


@pytest.mark.parametrize(
    ("tried", "kept", "size"), [(61, 40, 1), (61, 61, 1), (96, 7, 1), (3, 1, 1), (96, 96, 1), (9, 5, 8), (4, 4, 24)]
)
def test_it_is_what_the_whole_mlp_gives(way: str, tried: int, kept: int, size: int) -> None:
    counts = {"tried": tried, "kept": kept, "size": size}
    expected, found = specified(*given(), **counts), one_token(*given(), **counts)
    torch.testing.assert_close(found, expected)
    assert found.tried_BTG.sum() == tried
    assert found.kept_BTG.sum() == kept


def test_bf16_weights_are_added_up_in_fp32(way: str) -> None:
    counts = {"tried": 61, "kept": 40, "size": 1}
    x, a, typical, up, down = given(torch.bfloat16)
    expected = specified(x.float(), a.float(), typical, up.float(), down.float(), **counts)
    found = one_token(x, a, typical, up, down, **counts)
    assert found.y_BTD.dtype == torch.bfloat16
    torch.testing.assert_close(found.score_BTG, expected.score_BTG)
    assert torch.equal(found.tried_BTG, expected.tried_BTG)
    if way == "in place":
        assert torch.equal(found.kept_BTG, expected.kept_BTG)
        torch.testing.assert_close(found.y_BTD, expected.y_BTD.bfloat16())


def test_nan_is_not_hidden(way: str) -> None:
    x, a, *rest = given()
    a[..., 5] = float("nan")
    assert one_token(x, a, *rest, tried=61, kept=40, size=1).y_BTD.isnan().all()  # type: ignore[arg-type]


def test_as_many_as_asked_where_scores_are_equal(way: str) -> None:
    x, a, typical, up, down = given()
    found = one_token(x, torch.ones_like(a), torch.ones_like(typical), up, down, tried=30, kept=10, size=1)
    assert (int(found.tried_BTG.sum()), int(found.kept_BTG.sum())) == (30, 10)
    assert not (found.kept_BTG & ~found.tried_BTG).any()


@pytest.mark.parametrize("count", [1, 40, 96])
def test_the_largest_of_every_row(way: str, count: int) -> None:
    torch.manual_seed(0)
    score = torch.rand(3, 5, NEURONS).transpose(0, 1)
    expected = torch.zeros(5, 3, NEURONS, dtype=torch.bool).scatter(-1, score.topk(count, -1).indices, True)
    assert torch.equal(largest(score, count), expected)
    score[1, 2, 7] = float("nan")
    found = largest(score, count)
    assert found[1, 2, 7]
    assert (found.sum(-1) == count).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_matrix_is_turned(dtype: torch.dtype) -> None:
    pytest.importorskip("numba")
    weight = torch.randn(37, 50).to(dtype)
    assert torch.equal(magnitude.transposed(weight), weight.t())
    assert magnitude.transposed(weight).is_contiguous()


def test_a_copy_shares_the_weights() -> None:
    parts = MagnitudeWeights(*given()[2:], tried=3, kept=2, size=1)
    assert copy.deepcopy({"held": parts})["held"].up_FD is parts.up_FD


@pytest.mark.parametrize("weight", [torch.zeros(4, 4, dtype=torch.float16), torch.zeros(4, 4, device="meta")])
def test_other_weights_are_copied(weight: torch.Tensor) -> None:
    assert not magnitude.reads_in_place(weight, weight)
    assert not magnitude.reads_in_place(torch.zeros(4, 4), torch.zeros(4, 4).bfloat16())
