"""PolyGLU's activation mixture as one Triton kernel forward and one backward; it must equal the one in `reference`.

Like the function in `cpu`, it saves only its inputs for the backward pass. Each program computes a tile of tokens by
neurons with all four softmax weights and activations in registers. Sums over tokens and neurons are written as one
partial sum per tile and added afterwards, so that results do not depend on the order in which programs run. The
gradients are derived in `cpu`.

Shape letters: B rows, T tokens, F neurons, A activations; in kernels, t and f are the tokens and neurons of a tile.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

TOKENS, NEURONS, WARPS = 32, 64, 8  # of a tile; backward takes 128 registers a thread, as it may without spilling
SQRT_HALF: tl.constexpr = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI: tl.constexpr = tl.constexpr(0.3989422804014327)


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """Mix A activation functions for each neuron and token (PolyGLU), by Triton kernels on a GPU.

    The result, [B, T, F] in the dtype of the gate, is sum_k softmax_k((static + dynamic) / temperature) act_k(gate),
    with act = ReLU, tanh, SiLU, GELU. gate_BTF: pre-activations, [B, T, F] (rows, tokens, neurons). static_BFA: logits
    of each neuron, [1 or B, F, A]. dynamic_BTA: logits of each token, [B, 1 or T, A]. temperature: a positive number.
    """
    static_BAF, dynamic_BAT = (
        (x.float() / temperature).transpose(1, 2).contiguous() for x in (static_BFA, dynamic_BTA)
    )
    return _Mix.apply(gate_BTF.contiguous(), static_BAF, dynamic_BAT)  # type: ignore[no-any-return]


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, static: Tensor, dynamic: Tensor) -> Tensor:
        ctx.save_for_backward(gate, static, dynamic)
        out = torch.empty_like(gate)
        if gate.numel():
            _forward[_grid(gate)](gate, static, dynamic, out, **_sizes(gate, static, dynamic))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, static, dynamic = ctx.saved_tensors
        (B, T, width), (tokens, neurons, _) = gate.shape, _grid(gate)
        d_gate = torch.empty_like(gate)
        # d of the last activation's logit is the negative sum of the others.
        d_static = gate.new_empty(B, tokens, 3, width, dtype=torch.float32)
        d_dynamic = gate.new_empty(B, neurons, 3, T, dtype=torch.float32)
        if gate.numel():
            sizes = _sizes(gate, static, dynamic)
            _backward[_grid(gate)](gate, static, dynamic, grad.contiguous(), d_gate, d_static, d_dynamic, **sizes)
        return d_gate, _whole(d_static, static), _whole(d_dynamic, dynamic)


def _grid(gate: Tensor) -> tuple[int, int, int]:
    B, T, width = gate.shape
    return triton.cdiv(T, TOKENS), triton.cdiv(width, NEURONS), B


def _sizes(gate: Tensor, static: Tensor, dynamic: Tensor) -> dict[str, int]:
    """Return the arguments of the kernels that are numbers: lengths, strides in elements, and the shape of a tile.

    gate: [B, T, F]. static: logits of neurons, [1 or B, A, F]. dynamic: logits of tokens, [B, A, 1 or T]. An axis of
    size 1 that stands for all rows, or all tokens, has stride 0.
    """
    _, T, width = gate.shape
    return {
        "T": T,
        "F": width,
        "static_row": static.stride(0) if static.shape[0] > 1 else 0,
        "dynamic_row": dynamic.stride(0),
        "dynamic_part": dynamic.shape[2],
        "dynamic_token": 1 if dynamic.shape[2] > 1 else 0,
        "TOKENS": TOKENS,
        "NEURONS": NEURONS,
        "num_warps": WARPS,
    }


def _whole(parts_BP3X: Tensor, like_BAX: Tensor) -> Tensor:
    """Return the gradient of the neurons' or of the tokens' logits, from the partial sums of all P tiles.

    parts_BP3X: the sums for the first three activations; the fourth gradient is the negative sum of these. X is F or T.
    like_BAX: the logits, whose shape the result has.
    """
    first_B3X = parts_BP3X.sum(1)
    d_BAX = torch.cat((first_B3X, -first_B3X.sum(1, keepdim=True)), dim=1)
    return d_BAX.sum_to_size(like_BAX.shape)


@triton.jit
def _place(T, F, TOKENS: tl.constexpr, NEURONS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return this program's row, the indices of its tile's tokens and neurons, and masks of those that exist."""
    t = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    f = tl.program_id(1) * NEURONS + tl.arange(0, NEURONS)
    return tl.program_id(2), t, f, t < T, f < F


@triton.jit
def _powers(static, dynamic, b, t, f, there_t, there_f, F, static_row, dynamic_row, dynamic_part, dynamic_token):  # type: ignore[no-untyped-def]
    """Return exp(z - largest of the four z) for the logits z = static + dynamic of a tile, and the sum of the four.

    static, dynamic: pointers to the logits. b, t, f: row, tokens and neurons of the tile. there_t, there_f: masks of
    those that exist. The other arguments are those of `_sizes`. Each result is fp32 [TOKENS, NEURONS].
    """
    s = static + b * static_row + f
    c = dynamic + b * dynamic_row + t * dynamic_token
    z0 = tl.load(c, there_t, 0.0)[:, None] + tl.load(s, there_f, 0.0)[None, :]
    z1 = tl.load(c + dynamic_part, there_t, 0.0)[:, None] + tl.load(s + F, there_f, 0.0)[None, :]
    z2 = tl.load(c + 2 * dynamic_part, there_t, 0.0)[:, None] + tl.load(s + 2 * F, there_f, 0.0)[None, :]
    z3 = tl.load(c + 3 * dynamic_part, there_t, 0.0)[:, None] + tl.load(s + 3 * F, there_f, 0.0)[None, :]
    top = tl.maximum(tl.maximum(z0, z1), tl.maximum(z2, z3))
    e0, e1, e2, e3 = tl.exp(z0 - top), tl.exp(z1 - top), tl.exp(z2 - top), tl.exp(z3 - top)
    return e0, e1, e2, e3, e0 + e1 + e2 + e3


@triton.jit
def _values(g):  # type: ignore[no-untyped-def]
    """Return ReLU, tanh, SiLU and GELU (by erf) of g, then sigmoid(g) and the normal distribution function of g."""
    tanh = 2 * tl.sigmoid(2 * g) - 1
    sigmoid = tl.sigmoid(g)
    normal = 0.5 * (1 + tl.erf(g * SQRT_HALF))
    return tl.maximum(g, 0.0), tanh, g * sigmoid, g * normal, sigmoid, normal


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    gate,
    static,
    dynamic,
    out,
    T,
    F,
    static_row,
    dynamic_row,
    dynamic_part,
    dynamic_token,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    b, t, f, there_t, there_f = _place(T, F, TOKENS, NEURONS)
    at, there = (b.to(tl.int64) * T + t[:, None]) * F + f[None, :], there_t[:, None] & there_f[None, :]
    e0, e1, e2, e3, total = _powers(
        static, dynamic, b, t, f, there_t, there_f, F, static_row, dynamic_row, dynamic_part, dynamic_token
    )
    relu, tanh, silu, gelu, _, _ = _values(tl.load(gate + at, there, 0.0).to(tl.float32))
    mixed = (e0 * relu + e1 * tanh + e2 * silu + e3 * gelu) / total
    tl.store(out + at, mixed.to(out.dtype.element_ty), there)


@triton.jit
def _backward(  # type: ignore[no-untyped-def]
    gate,
    static,
    dynamic,
    grad,
    d_gate,
    d_static,
    d_dynamic,
    T,
    F,
    static_row,
    dynamic_row,
    dynamic_part,
    dynamic_token,
    TOKENS: tl.constexpr,
    NEURONS: tl.constexpr,
):
    b, t, f, there_t, there_f = _place(T, F, TOKENS, NEURONS)
    at, there = (b.to(tl.int64) * T + t[:, None]) * F + f[None, :], there_t[:, None] & there_f[None, :]
    e0, e1, e2, e3, total = _powers(
        static, dynamic, b, t, f, there_t, there_f, F, static_row, dynamic_row, dynamic_part, dynamic_token
    )
    g = tl.load(gate + at, there, 0.0).to(tl.float32)
    relu, tanh, silu, gelu, sigmoid, normal = _values(g)
    dy = tl.load(grad + at, there, 0.0).to(tl.float32) / total
    d0, d1, d2, d3 = dy * e0, dy * e1, dy * e2, dy * e3
    density = INV_SQRT_2PI * tl.exp(-0.5 * g * g)
    slope = tl.where(g > 0, d0, 0.0) + d1 * (1 - tanh * tanh)
    slope += d2 * sigmoid * (1 + g * (1 - sigmoid)) + d3 * (normal + g * density)
    tl.store(d_gate + at, slope.to(d_gate.dtype.element_ty), there)
    d0, d1, d2 = d0 * relu, d1 * tanh, d2 * silu
    shared = (d0 + d1 + d2 + d3 * gelu) / total
    d0, d1, d2 = d0 - e0 * shared, d1 - e1 * shared, d2 - e2 * shared
    by_f = d_static + ((b * tl.num_programs(0) + tl.program_id(0)) * 3) * F + f
    by_t = d_dynamic + ((b * tl.num_programs(1) + tl.program_id(1)) * 3) * T + t
    tl.store(by_f, tl.sum(d0, 0), there_f)
    tl.store(by_f + F, tl.sum(d1, 0), there_f)
    tl.store(by_f + 2 * F, tl.sum(d2, 0), there_f)
    tl.store(by_t, tl.sum(d0, 1), there_t)
    tl.store(by_t + T, tl.sum(d1, 1), there_t)
    tl.store(by_t + 2 * T, tl.sum(d2, 1), there_t)
