"""Mechanisms around blocks that are not ours."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from skipstone import EarlyExit, MixtureOfDepths, Routed, TokenSelective


class NanoBlock(nn.Module):
    """A residual block as people write it: causal attention and an MLP, no word of routing."""

    def __init__(self, width: int, causal: bool = True) -> None:
        super().__init__()
        self.causal = causal
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.seen: list[int] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x.shape[1])
        q, k, v = (y.unflatten(-1, (2, -1)).transpose(1, 2) for y in self.qkv(self.norm1(x)).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


@pytest.mark.parametrize("causal", [True, False], ids=["nanogpt", "vit"])
def test_block_computes_only_what_is_kept(causal: bool) -> None:
    routed = Routed(NanoBlock(16, causal), MixtureOfDepths(16, capacity=0.25, decision="topk"))
    x = torch.randn(3, 20, 16)
    y, records = routed(x, return_records=True)
    kept = records["MixtureOfDepths"].kept_BT
    assert routed.block.seen == [5]
    assert kept.sum(1).tolist() == [5, 5, 5]
    assert torch.equal(y[~kept], x[~kept])
    expected = torch.stack([row[keep] for row, keep in zip(x, kept, strict=True)])
    weight = torch.stack([w[keep] for w, keep in zip(records["MixtureOfDepths"].weight_BT, kept, strict=True)])
    delta = (routed.block(expected) - expected) * weight[..., None]
    torch.testing.assert_close(y[kept], (expected + delta).flatten(0, 1))


def test_neutral_mechanisms_leave_the_block_as_it_is() -> None:
    block = NanoBlock(16)
    mechanisms = [MixtureOfDepths(16), TokenSelective(16), EarlyExit(16)]
    for mechanism in mechanisms:
        mechanism.set_identity()
    x = torch.randn(2, 9, 16)
    for routing in ("oracle", "causal"):
        torch.testing.assert_close(Routed(block, *mechanisms)(x, routing=routing), block(x), rtol=1e-3, atol=1e-3)


def test_causal_routing_does_not_look_ahead() -> None:
    routed = Routed(NanoBlock(16), MixtureOfDepths(16, capacity=0.5, decision="threshold")).eval()
    x = torch.randn(2, 11, 16)
    other = x.clone()
    other[:, 7:] = torch.randn(2, 4, 16)
    y, records = routed(x, return_records=True)
    assert 0 < records["MixtureOfDepths"].kept_BT[:, :7].float().mean() < 1
    torch.testing.assert_close(routed(other)[:, :7], y[:, :7])


def test_gradients_reach_router_and_block() -> None:
    routed = Routed(
        NanoBlock(16), MixtureOfDepths(16, capacity=0.5, decision="predictor", weight="raw"), TokenSelective(16)
    )
    routed(torch.randn(2, 8, 16)).square().sum().backward()
    silent = [n for n, p in routed.named_parameters() if p.grad is None or not p.grad.norm() > 0]
    assert all(".decision." in name for name in silent)  # the predictor learns from its own loss only


def test_mistyped_option_and_routing_are_one_line() -> None:
    with pytest.raises(ValueError, match="did you mean 'capacity'"):
        MixtureOfDepths(16, capcity=0.5)
    with pytest.raises(ValueError, match="unknown routing 'orcale'; did you mean 'oracle'"):
        Routed(NanoBlock(16), MixtureOfDepths(16))(torch.randn(1, 4, 16), routing="orcale")
