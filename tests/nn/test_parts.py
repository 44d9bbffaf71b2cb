"""Norm, positions, MLP and the order of a block."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from skipstone.core.tokens import Tokens
from skipstone.mechanisms import PolyGLU
from skipstone.nn.attention import Attention, AttentionShape
from skipstone.nn.block import Block, Residual
from skipstone.nn.mlp import FUNCTIONS, FixedActivation, GatedMLP, PlainMLP
from skipstone.nn.norm import RMSNorm
from skipstone.nn.positions import Rotary


def tokens(T: int = 5) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot)


def test_rmsnorm() -> None:
    norm, x = RMSNorm(8, 1e-5), torch.randn(3, 8) * 4
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (8,), norm.weight, 1e-5))
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


def test_rotary_angles() -> None:
    config = SimpleNamespace(rope_parameters={"rope_type": "default", "rope_theta": 100.0}, head_dim=4)
    cos, sin = Rotary(config)(torch.tensor([[0, 3]]), torch.float32)
    assert cos.shape == sin.shape == (1, 2, 4)
    torch.testing.assert_close(cos[0, 1], torch.tensor([3.0, 0.3, 3.0, 0.3]).cos())
    torch.testing.assert_close(sin[0, 1], torch.tensor([-3.0, -0.3, 3.0, 0.3]).sin())  # the first half negated
    assert (cos[0, 0] == 1).all()
    assert (sin[0, 0] == 0).all()


@pytest.mark.parametrize("name", FUNCTIONS)
def test_mlps(name: str) -> None:
    x = torch.randn(2, 5, 8)
    gated, plain = GatedMLP(8, 12, FixedActivation(name)), PlainMLP(8, 12, FixedActivation(name), bias=True)
    y, records = gated(x, tokens())
    torch.testing.assert_close(y, gated.down_proj(FUNCTIONS[name](gated.gate_proj(x)) * gated.up_proj(x)))
    assert records == {}
    torch.testing.assert_close(plain(x, tokens())[0], plain.down_proj(FUNCTIONS[name](plain.up_proj(x))))


@pytest.mark.parametrize("activation", [FixedActivation("silu"), PolyGLU(16, 24)], ids=["silu", "polyglu"])
def test_an_mlp_keeps_one_copy_of_its_input_under_autocast(activation: nn.Module) -> None:
    mlp, x, kept = GatedMLP(16, 24, activation), torch.randn(3, 5, 16, requires_grad=True), set()

    def note(saved: torch.Tensor) -> torch.Tensor:
        if saved.numel() == x.numel() and saved.shape[-1] == 16:
            kept.add((saved.untyped_storage().data_ptr(), saved.dtype))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved), torch.autocast("cpu", torch.bfloat16):
        y, _ = mlp(x, tokens())
    assert {dtype for _, dtype in kept} == {torch.bfloat16}
    assert len(kept) == 1
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.float32


def block(dropout: float = 0.0) -> Block:
    torch.manual_seed(0)
    shape = AttentionShape(hidden_size=8, num_heads=2, num_key_value_heads=2, head_dim=4, residual_dropout=dropout)
    attention = Attention(shape, SimpleNamespace(_attn_implementation="sdpa", cache_format="float"), 0)
    return Block(
        attention,
        GatedMLP(8, 12, FixedActivation("silu"), dropout=dropout),
        Residual(before_attention=RMSNorm(8), before_mlp=RMSNorm(8)),
        {},
        {},
    )


def test_a_plain_block_adds_attention_then_mlp() -> None:
    plain, x = block(), torch.randn(2, 5, 8)
    h = x + plain.self_attn(plain.input_layernorm(x), tokens())
    expected = h + plain.mlp(plain.post_attention_layernorm(h), tokens())[0]
    got, records = plain(x, tokens())
    assert torch.equal(got, expected)
    assert records == {}
    assert plain.routing_modules() == {}


def test_dropout_acts_in_training_only() -> None:
    dropped, x = block(dropout=0.5), torch.randn(2, 5, 8)
    assert not torch.equal(dropped(x, tokens())[0], dropped(x, tokens())[0])
    dropped.eval()
    assert torch.equal(dropped(x, tokens())[0], block()(x, tokens())[0])


class Halve(nn.Module):
    """A mechanism at its simplest."""

    def forward(self, update, x, tokens):  # type: ignore[no-untyped-def]
        delta, records = update(x, tokens)
        return delta / 2, {**records, "halve": "seen"}


def test_a_mechanism_wraps_its_own_site() -> None:
    x = torch.randn(2, 5, 8)
    for site in ("block", "attention", "mlp"):
        plain = block()
        wrapped = block()
        wrapped.mechanisms["halve"] = Halve()
        wrapped.sites[site] = ["halve"]
        a = plain.self_attn(plain.input_layernorm(x), tokens()) * (0.5 if site == "attention" else 1)
        m = plain.mlp(plain.post_attention_layernorm(x + a), tokens())[0] * (0.5 if site == "mlp" else 1)
        expected = x + (a + m) * (0.5 if site == "block" else 1)
        got, records = wrapped(x, tokens())
        torch.testing.assert_close(got, expected)
        assert records == {"halve": "seen"}
