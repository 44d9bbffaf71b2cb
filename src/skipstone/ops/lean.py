"""PolyGLU's mixture without its [B, T, F, A] tensor: meaning and signature of `reference`, less memory and time.

Saves nothing but its inputs and recomputes in backward, in chunks of tokens small enough to stay in the cache. With
p = softmax(s + c) of a neuron's part s and a token's part c, h the activations, dy the gradient of y = sum_k p_k h_k:

    d gate = sum_k dy p_k h'_k        d s_k = d c_k = dy p_k h_k - p_k sum_j dy p_j h_j,    which add up to 0 over k

Shape letters: B rows, T tokens, N tokens of a chunk (or 1 that serves all), F neurons, A activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK_ELEMENTS = 1 << 15  # of one [N, F] tensor: with some dozen companions about 2 MB in fp32


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
    @staticmethod
    def forward(ctx: Any, gate: Tensor, static: Tensor, dynamic: Tensor) -> Tensor:
        ctx.save_for_backward(gate, static, dynamic)
        parts, work = (_by_activation(static), _by_activation(dynamic)), _workspace(gate, 2)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for b, at in _chunks(gate):
            power_ANF, values_ANF = work[:, :, : at.stop - at.start]
            total_NF = _powers(*parts, b, at, power_ANF)
            _values(gate[b, at].float(), values_ANF)
            out[b, at] = _sum(power_ANF.mul_(values_ANF)).div_(total_NF)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, static, dynamic = ctx.saved_tensors
        parts, work = (_by_activation(static), _by_activation(dynamic)), _workspace(gate, 3)
        d_gate = torch.empty_like(gate)
        d_static, d_dynamic = (torch.zeros_like(part[:, :-1]) for part in parts)
        for b, at in _chunks(gate):
            power_ANF, values_ANF, d_ANF = work[:, :, : at.stop - at.start]
            g_NF, total_NF = gate[b, at].float(), _powers(*parts, b, at, power_ANF)
            _values(g_NF, values_ANF)
            torch.mul(power_ANF, grad[b, at].float() / total_NF, out=d_ANF)  # dy p_k
            d_gate[b, at] = _slope(d_ANF, g_NF, values_ANF[1])
            d_logit_ANF = _through_softmax(d_ANF.mul_(values_ANF), power_ANF, total_NF)
            _row(d_static, b).add_(d_logit_ANF.sum(1))
            into_AN, found_AN = _row(d_dynamic, b), d_logit_ANF.sum(2)
            if into_AN.shape[1] > 1:
                into_AN[:, at].add_(found_AN)
            else:
                into_AN.add_(found_AN.sum(1, keepdim=True))
        return d_gate, _with_last(d_static), _with_last(d_dynamic)


def _workspace(gate: Tensor, parts: int) -> Tensor:
    """fp32 [parts, A, N, F], the same memory for every chunk: what is allocated anew is not in the cache."""
    T, width = gate.shape[1:]
    return torch.empty(parts, 4, min(_step(width), T), width, device=gate.device)


def _step(width: int) -> int:
    """Tokens of a chunk."""
    return max(1, CHUNK_ELEMENTS // max(width, 1))


def _chunks(gate: Tensor) -> list[tuple[int, slice]]:
    B, T, width = gate.shape
    step = _step(width)
    return [(b, slice(start, min(start + step, T))) for b in range(B) for start in range(0, T, step)]


def _row(static: Tensor, b: int) -> Tensor:
    """What belongs to row b; one row serves all where they agree."""
    return static[b if static.shape[0] > 1 else 0]


def _by_activation(logits: Tensor) -> Tensor:
    """[B, A, F or T], contiguous."""
    return logits.transpose(1, 2).contiguous()


def _powers(static_BAF: Tensor, dynamic_BAT: Tensor, b: int, at: slice, out_ANF: Tensor) -> Tensor:
    """Shares [A, N, F] that have still to be divided by their sum [N, F], which is returned."""
    at = at if dynamic_BAT.shape[2] > 1 else slice(None)
    torch.add(_row(static_BAF, b)[:, None], _row(dynamic_BAT, b)[:, at, None].expand_as(out_ANF), out=out_ANF)
    return _sum(out_ANF.sub_(out_ANF.amax(0)).exp_())


def _values(g_NF: Tensor, out_ANF: Tensor) -> None:
    """The palette of `reference.ACTIVATIONS`."""
    torch.clamp(g_NF, min=0, out=out_ANF[0])
    torch.tanh(g_NF, out=out_ANF[1])
    torch.ops.aten.silu.out(g_NF, out=out_ANF[2])
    torch.ops.aten.gelu.out(g_NF, out=out_ANF[3])


def _slope(d_ANF: Tensor, g_NF: Tensor, tanh_NF: Tensor) -> Tensor:
    """sum_k d_k h'_k, [N, F]."""
    total_NF = torch.ops.aten.threshold_backward(d_ANF[0], g_NF, 0)
    total_NF += torch.ops.aten.tanh_backward(d_ANF[1], tanh_NF)
    total_NF += torch.ops.aten.silu_backward(d_ANF[2], g_NF)
    total_NF += torch.ops.aten.gelu_backward(d_ANF[3], g_NF)
    return total_NF


def _through_softmax(d_ANF: Tensor, power_ANF: Tensor, total_NF: Tensor) -> Tensor:
    """d_k - p_k sum_j d_j without the last k, which is the negative sum of the others; overwrites its input."""
    sum_NF = _sum(d_ANF).div_(total_NF)
    return d_ANF[:-1].addcmul_(power_ANF[:-1], sum_NF, value=-1)


def _with_last(d_BAF: Tensor) -> Tensor:
    """[B, F or T, A]."""
    return torch.cat((d_BAF, -d_BAF.sum(1, keepdim=True)), dim=1).transpose(1, 2)


def _sum(x_ANF: Tensor) -> Tensor:
    """Over the first axis; several times as fast as `sum` over so few."""
    total_NF = x_ANF[0] + x_ANF[1]
    for part_NF in x_ANF[2:]:
        total_NF += part_NF
    return total_NF
