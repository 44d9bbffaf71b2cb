"""Products with some neuron groups equal those with all of them and zeros: values, every gradient, FLOPs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.measure.flops import count_flops
from skipstone.ops import reference as ops
from skipstone.ops.neurons import Runs, blocks_of, kept_linear, kept_part, mix_kept

N, WIDTH, GROUPS, SIZE = 13, 5, 6, 4
KEPT = [[0, 1, 4], [0, 1, 4], [2, 3, 5], [0, 3, 4]]
STARTS = [0, 4, 5, 12]  # of runs; the first two keep the same


def runs() -> Runs:
    begins_N = torch.zeros(N, dtype=torch.bool)
    begins_N[STARTS] = True
    group_NK = torch.tensor(KEPT).repeat_interleave(torch.tensor([4, 1, 7, 1]), 0)
    return Runs.of(group_NK, begins_N, GROUPS, SIZE)


def mask() -> Tensor:
    """[N, F], the neurons that are on."""
    mask_NG = torch.zeros(N, GROUPS)
    for (at, _), groups in zip(runs(), KEPT, strict=True):
        mask_NG[at, groups] = 1
    return mask_NG.repeat_interleave(SIZE, 1)


def among_all(y_NJ: Tensor) -> Tensor:
    """[N, F], 0 at neurons that are off."""
    return torch.zeros(N, GROUPS * SIZE).masked_scatter(mask().bool(), y_NJ)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).requires_grad_()


def test_adjacent_groups_are_one_block() -> None:
    assert blocks_of([0, 1, 4], 4) == [(slice(0, 8), slice(0, 8)), (slice(8, 12), slice(16, 20))]
    assert blocks_of([5], 2) == [(slice(0, 2), slice(10, 12))]
    assert runs().bounds == [0, 4, 5, 12, 13]


def test_into_neurons() -> None:
    x, weight = drawn(N, WIDTH), drawn(GROUPS * SIZE, WIDTH)
    expected = F.linear(x, weight) * mask()
    got = among_all(kept_linear(x, weight, runs(), 0))
    torch.testing.assert_close(got, expected)
    compare(got, expected, [x, weight])


def test_out_of_neurons() -> None:
    hidden, weight = drawn(N, 3 * SIZE), drawn(WIDTH, GROUPS * SIZE)
    expected, got = F.linear(among_all(hidden), weight), kept_linear(hidden, weight, runs(), 1)
    torch.testing.assert_close(got, expected)
    compare(got, expected, [hidden, weight])


def compare(got: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    direction = drawn(*got.shape).detach()
    for mine, yours in zip(*(torch.autograd.grad(y, inputs, direction) for y in (got, expected)), strict=True):
        torch.testing.assert_close(mine, yours)


@pytest.mark.parametrize("axis", [0, 1])
def test_only_what_is_on_is_multiplied_or_read(axis: int) -> None:
    shape = (GROUPS * SIZE, WIDTH) if axis == 0 else (WIDTH, GROUPS * SIZE)
    weight, x = drawn(*shape), drawn(N, WIDTH if axis == 0 else 3 * SIZE)
    with torch.no_grad():
        weight.unflatten(axis, (GROUPS, SIZE)).select(axis, 2).fill_(float("nan"))
    same = Runs.of(torch.tensor(KEPT[:1]).expand(N, -1), torch.arange(N) == 0, GROUPS, SIZE)
    count = count_flops(lambda: kept_linear(x, weight, same, axis).sum().backward())
    assert count.unknown == ()
    assert count.total == 3 * 2 * N * WIDTH * 3 * SIZE
    assert x.grad is not None
    assert weight.grad is not None
    assert x.grad.isfinite().all()
    found_G = weight.grad.unflatten(axis, (GROUPS, SIZE)).movedim(axis, 0).flatten(1).abs().amax(1) > 0
    assert found_G.tolist() == [True, True, False, False, True, False]


def test_a_part_of_the_weights() -> None:
    weight = drawn(GROUPS * SIZE, WIDTH)
    assert torch.equal(kept_part(weight, torch.tensor([1, 4]), GROUPS, 0), torch.cat((weight[4:8], weight[16:20])))
    assert torch.equal(kept_part(weight.t(), torch.tensor([5]), GROUPS, 1), weight[20:].t())


def test_bfloat16_sums_over_runs_in_fp32() -> None:
    """Many runs of one token: rounding the sum after each would lose small terms."""
    many, ones = 400, torch.ones(400, WIDTH, dtype=torch.bfloat16)
    each = Runs.of(torch.zeros(many, 1, dtype=torch.long), torch.ones(many, dtype=torch.bool), GROUPS, SIZE)
    weight = torch.zeros(GROUPS * SIZE, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    kept_linear(ones, weight, each, 0).sum().backward()
    assert weight.grad is not None
    assert (weight.grad[:SIZE] == many).all()


@pytest.mark.parametrize("rows", [1, 2])
def test_mix_of_the_neurons_that_are_on(rows: int) -> None:
    gate, static, dynamic = drawn(N, GROUPS * SIZE), drawn(rows, GROUPS * SIZE, 4), drawn(N, 4)
    row_N = (torch.arange(N) >= 5).long() * (rows - 1)
    own = static.index_select(0, row_N)[:, None]  # each token as a row of one
    expected = torch.cat(
        [ops.mix_activations(gate[n][None, None], own[n], dynamic[n][None, None], 0.7)[0] for n in range(N)]
    )
    on = gate[mask().bool()].view(N, -1)
    got = among_all(mix_kept(on, static, dynamic, 0.7, runs(), row_N))
    compare(got, expected * mask(), [gate, static, dynamic])
    torch.testing.assert_close(got, expected * mask())
