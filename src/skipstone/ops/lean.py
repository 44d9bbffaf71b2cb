"""PolyGLU's mixture without its [B, T, F, A] tensor: meaning and signature of `reference`, less memory and time.

Saves nothing but its inputs and recomputes in backward, in chunks of tokens small enough to stay in the cache.
Shape letters: B rows, T tokens, N tokens of a chunk, F neurons, A activations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 17  # of one [N, F] tensor: with its handful of companions about 4 MB in fp32


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """See `reference.mix_activations`; the temperature gets no gradient."""
    static_BFA, dynamic_BTA = static_BFA.float() / temperature, dynamic_BTA.float() / temperature
    if static_BFA.shape[0] > 1:
        return _Mix.apply(gate_BTF, static_BFA, dynamic_BTA)  # type: ignore[no-any-return]
    # Rows that share their static part are one long row: fewer and fuller chunks, above all in decoding.
    dynamic_1NA = dynamic_BTA.expand(*gate_BTF.shape[:2], -1).flatten(0, 1)[None]
    mixed_1NF = _Mix.apply(gate_BTF.flatten(0, 1)[None], static_BFA, dynamic_1NA)
    return mixed_1NF.view(gate_BTF.shape)  # type: ignore[no-any-return]


class _Mix(torch.autograd.Function):
    """y = sum_k p_k h_k(g), p = softmax_k(s + c)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, static: Tensor, dynamic: Tensor) -> Tensor:
        ctx.save_for_backward(gate, static, dynamic)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for b, at in _chunks(gate):
            g_NF = gate[b, at].float()
            out[b, at] = _mixed(_shares(_row(static, b), _tokens(dynamic, b, at)), _values(g_NF)).to(out.dtype)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, static, dynamic = ctx.saved_tensors
        d_gate, d_static, d_dynamic = torch.empty_like(gate), torch.zeros_like(static), torch.zeros_like(dynamic)
        for b, at in _chunks(gate):
            g_NF, dy_NF = gate[b, at].float(), grad[b, at].float()
            shares, values = _shares(_row(static, b), _tokens(dynamic, b, at)), _values(g_NF)
            y_NF = _mixed(shares, values)
            slope_NF = _mixed(shares, _slopes(g_NF, values))
            d_gate[b, at] = slope_NF.mul_(dy_NF).to(d_gate.dtype)
            into_static, into_dynamic = _row(d_static, b), _tokens(d_dynamic, b, at)
            for k, (share_NF, value_NF) in enumerate(zip(shares, values, strict=True)):
                d_logit_NF = value_NF.sub_(y_NF).mul_(share_NF).mul_(dy_NF)
                into_static[:, k] += d_logit_NF.sum(0)
                per_token_N = d_logit_NF.sum(1)
                into_dynamic[:, k] += (
                    per_token_N if into_dynamic.shape[0] == per_token_N.shape[0] else per_token_N.sum()
                )
        return d_gate, d_static, d_dynamic


def _chunks(gate: Tensor) -> list[tuple[int, slice]]:
    B, T, width = gate.shape
    step = max(1, CHUNK_ELEMENTS // max(width, 1))
    return [(b, slice(start, min(start + step, T))) for b in range(B) for start in range(0, T, step)]


def _row(static: Tensor, b: int) -> Tensor:
    """[F, A] of row b; one row serves all where they agree."""
    return static[b if static.shape[0] > 1 else 0]


def _tokens(dynamic: Tensor, b: int, at: slice) -> Tensor:
    """[N or 1, A] of a chunk; one token serves all where the row agrees."""
    row = dynamic[b if dynamic.shape[0] > 1 else 0]
    return row[at] if row.shape[0] > 1 else row


def _shares(static_FA: Tensor, dynamic_NA: Tensor) -> list[Tensor]:
    """The softmax over activations as one [N, F] tensor each."""
    logits = [static_FA[:, k] + dynamic_NA[:, k, None] for k in range(static_FA.shape[1])]
    top_NF = logits[0].clone()
    for logit_NF in logits[1:]:
        torch.maximum(top_NF, logit_NF, out=top_NF)
    powers = [logit_NF.sub_(top_NF).exp_() for logit_NF in logits]
    total_NF = torch.zeros_like(top_NF)
    for power_NF in powers:
        total_NF += power_NF
    total_NF.reciprocal_()
    return [power_NF.mul_(total_NF) for power_NF in powers]


def _values(g_NF: Tensor) -> list[Tensor]:
    return [g_NF.relu(), g_NF.tanh(), F.silu(g_NF), F.gelu(g_NF)]


def _slopes(g_NF: Tensor, values: list[Tensor]) -> list[Tensor]:
    """Derivatives of ReLU, Tanh, SiLU and GELU, in the order of `_values`."""
    _, tanh_NF, silu_NF, _ = values
    sigmoid_NF = g_NF.sigmoid()
    density_NF = g_NF.square().mul_(-0.5).exp_().mul_(1 / math.sqrt(2 * math.pi))
    normal_NF = torch.special.ndtr(g_NF)
    return [
        (g_NF > 0).to(g_NF.dtype),
        1 - tanh_NF.square(),
        sigmoid_NF + silu_NF * (1 - sigmoid_NF),
        normal_NF.addcmul_(g_NF, density_NF),
    ]


def _mixed(shares: list[Tensor], values: list[Tensor]) -> Tensor:
    total_NF = shares[0] * values[0]
    for share_NF, value_NF in zip(shares[1:], values[1:], strict=True):
        total_NF.addcmul_(share_NF, value_NF)
    return total_NF
