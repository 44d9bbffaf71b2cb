"""Attention agrees with its formula: causal by slot, gathered, with some queries, grouped heads."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from skipstone.core.selection import Gathered, Padded
from skipstone.core.tokens import Tokens
from skipstone.nn.attention import Attention, AttentionShape
from skipstone.nn.norm import RMSNorm
from skipstone.nn.windows import slot_mask

H, G, E, D = 4, 2, 6, 16


def attention(kind: str = "sdpa", **more: object) -> Attention:
    torch.manual_seed(1)
    shape = AttentionShape(hidden_size=D, num_heads=H, num_key_value_heads=G, head_dim=E, **more)
    return Attention(shape, SimpleNamespace(_attn_implementation=kind, cache_format="float"), 0).eval()


def formula(layer: Attention, x_TD: Tensor, allowed_TT: Tensor) -> Tensor:
    """One row, head by head, without rotation."""
    q, k, v = (p(x_TD).unflatten(-1, (-1, E)) for p in (layer.q_proj, layer.k_proj, layer.v_proj))
    q, k = (q, k) if layer.q_norm is None else (layer.q_norm(q), layer.k_norm(k))
    heads = []
    for h in range(H):
        kv = h // (H // G)
        logits = q[:, h] @ k[:, kv].T / math.sqrt(E)
        heads.append(logits.masked_fill(~allowed_TT, -torch.inf).softmax(-1) @ v[:, kv])
    return layer.o_proj(torch.cat(heads, -1))


def tokens(T: int, **more: object) -> Tokens:
    slot = torch.arange(T)[None]
    return Tokens(slot_BT=slot, position_BT=slot, **more)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("more", [{}, {"bias": True, "output_bias": True}, {"norm": RMSNorm}], ids=str)
def test_formula(kind: str, more: dict[str, object]) -> None:
    layer, x = attention(kind, **more), torch.randn(2, 7, D)
    got = layer(x, tokens(7))
    for b in range(2):
        torch.testing.assert_close(got[b], formula(layer, x[b], torch.ones(7, 7).tril().bool()))


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_slots_decide_not_columns(kind: str) -> None:
    """A gathered row whose padding columns hold earlier slots than its tokens: they must not be seen."""
    layer, x = attention(kind), torch.randn(1, 5, D)
    slot, real = torch.tensor([[3, 5, 9, 0, 1]]), torch.tensor([[True, True, True, False, False]])
    given = replace(tokens(5), slot_BT=slot, position_BT=slot, real_BT=real)
    expected = formula(layer, x[0, :3], torch.ones(3, 3).tril().bool())
    for aligned in (True, False):
        torch.testing.assert_close(layer(x, replace(given, aligned=aligned))[0, :3], expected)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_only_who_asks_is_computed(kind: str) -> None:
    layer, x = attention(kind), torch.randn(2, 6, D)
    index, valid = torch.tensor([[1, 4], [5, 0]]), torch.tensor([[True, True], [True, False]])
    part = Padded(index, 6, valid)
    got, whole = layer(x, replace(tokens(6), queries=part)), layer(x, tokens(6))
    assert got.shape == (2, 2, D)
    torch.testing.assert_close(got[0], whole[0, [1, 4]])
    torch.testing.assert_close(got[1, 0], whole[1, 5])
    nobody = Gathered(torch.empty(2, 0, dtype=torch.long), 6)
    assert layer(x, replace(tokens(6), queries=nobody)).shape == (2, 0, D)


def test_documents_do_not_see_each_other() -> None:
    layer, x = attention(), torch.randn(1, 6, D)
    document = torch.tensor([[1, 1, 0, 0, 1, 1]])
    allowed = torch.ones(6, 6).tril().bool() & (document[0][:, None] == document[0])
    got = layer(x, replace(tokens(6), document_BT=document))
    torch.testing.assert_close(got[0], formula(layer, x[0], allowed))


def test_mask_lets_padding_see_everything() -> None:
    """Otherwise its softmax would be 0 / 0."""
    real = torch.tensor([[False, True, True]])
    mask = slot_mask(torch.arange(3)[None], None, replace(tokens(3), real_BT=real))
    assert mask[0, 0].tolist() == [[True] * 3, [True, True, False], [True] * 3]
