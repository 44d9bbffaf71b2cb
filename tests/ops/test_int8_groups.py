"""Int8 weights in groups of 32: matrices of other programs' files keep their values, and products are those of them."""

from __future__ import annotations

import pytest
import torch

from skipstone.ops import int8


def blocks(kind: str, outputs: int = 48, inputs: int = 96) -> torch.Tensor:
    """Return weights as llama.cpp restores them: an fp16 scale times integers, for each 32 inputs of a row."""
    made = torch.Generator().manual_seed(len(kind))
    low, high = {"Q8_0": (-127, 127), "Q5_0": (-16, 15), "Q4_0": (-8, 7), "ternary": (-1, 1)}[kind]
    number = torch.randint(low, high + 1, (outputs, inputs // 32, 32), generator=made)
    scale = (torch.rand(outputs, inputs // 32, 1, generator=made) / 50).half().float()
    return (number * scale).flatten(1)


@pytest.mark.parametrize("kind", ["Q8_0", "Q5_0", "Q4_0", "ternary"])
def test_weights_on_a_grid_keep_their_values(kind: str) -> None:
    weight = blocks(kind)
    weight[3, :32] = 0
    assert int8.on_a_grid(weight)
    assert torch.equal(int8.restore(*int8.quantise(weight, 32)), weight)


def test_other_weights_are_on_none() -> None:
    weight = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    assert not int8.on_a_grid(weight)
    assert not int8.on_a_grid(blocks("Q8_0")[:, 16:80].contiguous())  # blocks that begin elsewhere
    assert not int8.on_a_grid(blocks("Q8_0")[:, :40])
    mixed = blocks("Q8_0")
    mixed[::2] = weight[::2]
    assert not int8.on_a_grid(mixed)
    number, scale = int8.quantise(mixed, 32)
    assert (int8.restore(number, scale) - mixed).abs().max() <= mixed.abs().max() / 254 * 1.001


@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 7, 8, 9, 65, 128, 259])
@pytest.mark.parametrize("inputs", [32, 64, 96, 576])
def test_a_product_is_that_of_the_restored_weights(tokens: int, inputs: int) -> None:
    made = torch.Generator().manual_seed(tokens)
    number = torch.randint(-127, 128, (37, inputs), generator=made).to(torch.int8)
    scale = torch.rand(37, inputs // 32, generator=made) + 0.1
    x = torch.randn(tokens, inputs, generator=made)
    weight = int8.restore(number, scale)
    error = (int8.linear(x, number, scale).double() - x.double() @ weight.double().t()).abs().max()
    assert error < 4e-5 * x.norm(dim=-1).max() * weight.norm(dim=-1).max()


def test_outputs_by_sixteen_are_read_row_by_row() -> None:
    """A layout by input, which compiled steps make of groups of 64, is not taken for one here."""
    made = torch.Generator().manual_seed(0)
    number = torch.randint(-127, 128, (64, 64), generator=made).to(torch.int8).t()
    scale = (torch.rand(2, 64, generator=made) + 0.1).t()
    x = torch.randn(2, 64, generator=made)
    want = x.double() @ int8.restore(number, scale).double().t()
    assert (int8.linear(x, number, scale).double() - want).abs().max() < 1e-3 * want.abs().max()


def test_the_last_group_of_a_huge_matrix_is_looked_at() -> None:
    """Its index is not a number of fp32, which would round it up to one that does not exist."""
    assert int8.on_a_grid(torch.zeros(1, 32).expand(1 << 25, 32))


@pytest.mark.parametrize("group", [None, 64])
def test_large_fp16_tokens_do_not_overflow(group: int | None) -> None:
    made = torch.Generator().manual_seed(0)
    number, scale = int8.quantise(torch.rand(8, 640, generator=made) / 640, group)
    x = torch.full((65, 640), 1e4, dtype=torch.float16)
    want = x.float() @ int8.restore(number, scale).t()
    torch.testing.assert_close(int8.linear(x, number, scale).float(), want, rtol=2e-3, atol=0)
