"""Random numbers of tokens and rows are uniform, independent, and do not depend on the layout of tokens."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.core.noise import draw_seed, row_noise, token_noise
from skipstone.core.routing_module import Placement
from skipstone.core.row_subset import RowSubset
from skipstone.core.tokens import PassMode, Tokens

B, T = 64, 512
KEY, OTHER = (Placement(layer=layer, name="toy").noise_key for layer in (1, 2))


def tokens(seed: int = 3, **more: Any) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, noise_seed=torch.tensor(seed), **more)


def correlation(a: Tensor, b: Tensor) -> float:
    return torch.corrcoef(torch.stack((a.flatten(), b.flatten())))[0, 1].item()


def test_numbers_are_uniform() -> None:
    """Mean, variance and a histogram of 32,768 numbers, each within five standard errors, and never 0 or 1."""
    u = token_noise(tokens(), KEY, B)
    assert (u.shape, u.dtype) == ((B, T), torch.float32)
    assert 0 < u.min() < u.max() < 1
    error = 1 / math.sqrt(12 * u.numel())
    assert abs(u.mean().item() - 0.5) < 5 * error
    assert abs(u.var().item() - 1 / 12) < 5 * math.sqrt(1 / 180 / u.numel())
    counts = torch.histc(u, 64, 0, 1)
    expected = u.numel() / 64
    assert (counts - expected).abs().max() < 5 * math.sqrt(expected)


def test_neighbours_rows_channels_mechanisms_and_passes_are_independent() -> None:
    u, bound = token_noise(tokens(), KEY, B), 5 / math.sqrt(B * T)
    assert abs(correlation(u[:, 1:], u[:, :-1])) < bound
    assert abs(correlation(u[1:], u[:-1])) < bound
    assert abs(correlation(u, token_noise(tokens(), OTHER, B))) < bound
    assert abs(correlation(u, token_noise(tokens(seed=4), KEY, B))) < bound
    assert abs(correlation(u, row_noise(tokens(), KEY, B, T))) < bound
    channels = token_noise(tokens(), KEY, B, 2, 3)
    assert channels.shape == (B, T, 2, 3)
    assert abs(correlation(channels[..., 0, 0], channels[..., 1, 2])) < bound


@pytest.mark.parametrize("executor", ["gathered", "masked"])
def test_a_token_has_its_number_wherever_it_stands(executor: Any) -> None:
    whole = tokens(mode=PassMode(executor=executor))
    kept = torch.rand(B, T) < 0.4
    part = whole.select_kept(kept)
    inner, u = whole.select(part), token_noise(whole, KEY, B)
    assert torch.equal(part.scatter(token_noise(inner, KEY, B))[kept], u[kept])
    assert torch.equal(row_noise(inner, KEY, B), row_noise(whole, KEY, B))


def test_rows_of_a_step_keep_their_numbers() -> None:
    slot = torch.full((1, 1), 7)
    step = Tokens(slot_BT=slot, position_BT=slot, noise_seed=torch.tensor(3))
    some = replace(step, rows=RowSubset.from_mask(torch.tensor([False, True, False, True])))
    assert torch.equal(token_noise(some, KEY, 2), token_noise(step, KEY, 4)[[1, 3]])


def test_seeds_come_from_torch_s_generator() -> None:
    torch.manual_seed(5)
    first = draw_seed("cpu")
    second = draw_seed("cpu")
    torch.manual_seed(5)
    assert torch.equal(draw_seed("cpu"), first)
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    unseeded = replace(tokens(), noise_seed=None)
    assert torch.equal(token_noise(unseeded, KEY, B), token_noise(tokens(int(first)), KEY, B))


def test_a_compiler_follows_without_a_break() -> None:
    placement = Placement(layer=1, name="toy")

    def drawn(whole: Tokens) -> Tensor:
        return token_noise(whole, placement.noise_key, 4) + row_noise(whole, placement.noise_key, 4)[:, None]

    compiled = torch.compile(drawn, backend="aot_eager", fullgraph=True)
    for seed in (9, 10):
        assert torch.equal(compiled(tokens(seed)), drawn(tokens(seed)))
