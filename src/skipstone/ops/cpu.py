"""PolyGLU's activation mixture on a CPU without a [B, T, F, A] tensor, in less memory and time than `reference`.

The function saves only its inputs and recomputes the rest in the backward pass, in chunks of tokens small enough for
the processor's cache. The softmax factors into a part of the neuron, s, and a part of the token, c, so that
exponentials are taken of each part alone and not of every pair:

    p_k = exp(s_k) exp(c_k) / sum_j exp(s_j) exp(c_j)

With h the activations, y = sum_k p_k h_k, and dy its gradient:

    d gate = sum_k dy p_k h'_k        d s_k = d c_k = dy p_k (h_k - y), which add up to 0 over k

Shape letters: B rows, T tokens, N tokens of a chunk, F neurons, A activations.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from skipstone.ops import reference

CHUNK_ELEMENTS = 1 << 15  # of one [N, F] tensor; all tensors of a chunk together take 1.5 MB in fp32
# In nats below the largest logit. Products are exact enough if the logits of one part stay within NEAR, or those of a
# chunk's tokens within NEAR of each other: the sum of exponentials is then above e^-32 (e^-16), and logits of the other
# part below FAR contribute less than e^-21 of it. They are clamped to FAR, because products of smaller numbers are
# denormal and many times as slow.
NEAR, FAR = 32.0, -53.0


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """Mix A activation functions for each neuron and token (PolyGLU), in chunks that fit a CPU's cache.

    The result, [B, T, F] in the dtype of the gate, is sum_k softmax_k((static + dynamic) / temperature) act_k(gate),
    with act = ReLU, tanh, SiLU, GELU. gate_BTF: pre-activations, [B, T, F] (rows, tokens, neurons). static_BFA: logits
    of each neuron, [1 or B, F, A]. dynamic_BTA: logits of each token, [B, 1 or T, A]. temperature: a positive number.
    """
    if gate_BTF.dtype == torch.float64:  # the chunks below are laid out for fp32
        return reference.mix_activations(gate_BTF, static_BFA, dynamic_BTA, temperature)
    static_BFA, dynamic_BTA = static_BFA.float() / temperature, dynamic_BTA.float() / temperature
    dynamic_BTA = dynamic_BTA.expand(*gate_BTF.shape[:2], -1)
    if static_BFA.shape[0] > 1:
        return _Mix.apply(gate_BTF, static_BFA, dynamic_BTA)  # type: ignore[no-any-return]
    # Rows with the same static part are treated as one long row: fewer and fuller chunks, especially in decoding.
    mixed_1NF = _Mix.apply(gate_BTF.flatten(0, 1)[None], static_BFA, dynamic_BTA.flatten(0, 1)[None])
    return mixed_1NF.view(gate_BTF.shape)  # type: ignore[no-any-return]


class _Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, static: Tensor, dynamic: Tensor) -> Tensor:
        ctx.save_for_backward(gate, static, dynamic)
        shares = _shares(static, dynamic)
        out = torch.empty_like(gate, memory_format=torch.contiguous_format)
        for b, at, work, (*w, total_NF, h_NF, y_NF) in _chunks(gate, 7):
            g_NF = gate[b, at].float()
            shares.weigh(b, at, work[:4], total_NF)
            for k, value in enumerate(_VALUES):
                value(g_NF, h_NF)
                _multiply_add(y_NF, w[k], h_NF, first=k == 0)
            out[b, at] = y_NF.div_(total_NF)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        gate, static, dynamic = ctx.saved_tensors
        shares, d_gate = _shares(static, dynamic), torch.empty_like(gate)
        d_static, d_dynamic = (torch.zeros_like(part).transpose(1, 2).contiguous() for part in (static, dynamic))
        for b, at, work, (*parts, total_NF, y_NF, d_NF, more_NF) in _chunks(gate, 12):
            w, h, g_NF = parts[:4], parts[4:], gate[b, at].float()
            shares.weigh(b, at, work[:4], total_NF)
            for k, value in enumerate(_VALUES):
                value(g_NF, h[k])
                _multiply_add(y_NF, w[k], h[k], first=k == 0)
            y_NF.div_(total_NF)
            work[:4].mul_(torch.div(grad[b, at].float(), total_NF, out=total_NF))  # dy p_k
            for k, slope in enumerate(_SLOPES):
                slope(w[k], g_NF, h[k], more_NF if k else d_NF)
                if k:
                    d_NF.add_(more_NF)
            d_gate[b, at] = d_NF
            d_logit_ANF = work[4:7].sub_(y_NF).mul_(work[:3])  # the fourth is the negative sum of these three
            d_static[b if len(d_static) > 1 else 0, :-1].add_(d_logit_ANF.sum(1))
            d_dynamic[b, :-1, at] = d_logit_ANF.sum(2)
        return d_gate, _with_last(d_static), _with_last(d_dynamic)


class _Products:
    """Unnormalised shares of the activations, as products of exponentials of the neurons' and of the tokens' logits."""

    def __init__(self, static_BFA: Tensor, dynamic_BTA: Tensor) -> None:
        self.static_BAF = static_BFA.clamp(min=FAR).exp_().transpose(1, 2).contiguous()
        self.dynamic_BTA = dynamic_BTA.clamp(min=FAR).exp_()

    def weigh(self, b: int, at: slice, out_ANF: Tensor, total_NF: Tensor) -> None:
        """Write the unnormalised shares of a chunk of tokens to `out_ANF`, and their sums over A to `total_NF`.

        b: index of the row. at: the chunk's tokens in that row.
        """
        static_AF = self.static_BAF[b if len(self.static_BAF) > 1 else 0]
        _multiply(static_AF, self.dynamic_BTA[b, at], out_ANF, total_NF)


class _Centred(_Products):
    """Unnormalised shares for logits so far apart that exponentials of a single part would underflow.

    The tokens of a chunk usually have similar logits, because their contexts are means: the middle of their range is
    added to the neurons' part, and the rest is near 0. Where it is not, exponentials of the sums are taken.
    """

    def __init__(self, static_BFA: Tensor, dynamic_BTA: Tensor) -> None:
        self.static_BAF, self.dynamic_BTA = static_BFA.transpose(1, 2).contiguous(), dynamic_BTA

    def weigh(self, b: int, at: slice, out_ANF: Tensor, total_NF: Tensor) -> None:
        """Write the unnormalised shares of a chunk of tokens to `out_ANF`, and their sums over A to `total_NF`.

        b: index of the row. at: the chunk's tokens in that row.
        """
        static_AF, dynamic_NA = self.static_BAF[b if len(self.static_BAF) > 1 else 0], self.dynamic_BTA[b, at]
        least_A, most_A = dynamic_NA.aminmax(dim=0)
        if _near(least_A - most_A):
            middle_A = (least_A + most_A) / 2
            static_AF = static_AF + middle_A[:, None]
            static_AF = static_AF.sub_(static_AF.amax(0)).clamp_(min=FAR).exp_()
            _multiply(static_AF, (dynamic_NA - middle_A).exp(), out_ANF, total_NF)
        else:
            torch.add(dynamic_NA.T[:, :, None], static_AF[:, None], out=out_ANF)
            out_ANF.sub_(torch.amax(out_ANF, 0, out=total_NF)).clamp_(min=FAR).exp_()
            _add_up(out_ANF, total_NF)


def _multiply(static_AF: Tensor, dynamic_NA: Tensor, out_ANF: Tensor, total_NF: Tensor) -> None:
    """Write the products of two factors to `out_ANF`, and their sums over activations to `total_NF`.

    static_AF, dynamic_NA: exponentials of the neurons' and of the tokens' logits.
    """
    torch.mul(dynamic_NA.T[:, :, None], static_AF[:, None], out=out_ANF)
    _add_up(out_ANF, total_NF)


def _add_up(x_ANF: Tensor, total_NF: Tensor) -> None:
    """Write the sum of `x_ANF` over its four activations to `total_NF`."""
    torch.add(x_ANF[0], x_ANF[1], out=total_NF).add_(x_ANF[2]).add_(x_ANF[3])


def _shares(static_BFA: Tensor, dynamic_BTA: Tensor) -> _Products:
    """Return `_Products` if the logits of neurons, or those of tokens, are close to each other, else `_Centred`."""
    parts = [x - x.amax(-1, keepdim=True) for x in (static_BFA, dynamic_BTA)]
    return (_Products if any(map(_near, reversed(parts))) else _Centred)(*parts)


def _near(logits: Tensor) -> bool:
    """Return whether all logits, none of which is above 0, are at least -`NEAR`; True for fake tensors."""
    if isinstance(logits, FakeTensor) or not logits.numel():
        return True
    return bool(logits.amin().numpy() >= -NEAR)  # numpy: not counted as a host sync, and on a CPU it is none


def _chunks(gate: Tensor, parts: int) -> Iterator[tuple[int, slice, Tensor, list[Tensor]]]:
    """Yield the row and the token range of each chunk, with its working memory as one tensor and as a list of tensors.

    gate: [B, T, F]. parts: number of working tensors; the memory is fp32 [parts, N, F]. All chunks use the same memory,
    because newly allocated memory is not in the processor's cache.
    """
    B, T, width = gate.shape
    step = max(1, min(CHUNK_ELEMENTS // max(width, 1), T))
    work = torch.empty(parts, step, width, device=gate.device)
    whole = list(work)
    for b in range(B):
        for start in range(0, T, step):
            at = slice(start, min(start + step, T))
            rest = None if at.stop - start == step else work[:, : at.stop - start]
            yield (b, at, work, whole) if rest is None else (b, at, rest, list(rest))


def _multiply_add(sum_NF: Tensor, x_NF: Tensor, y_NF: Tensor, *, first: bool) -> None:
    """Add x_NF * y_NF to sum_NF in place; if `first`, write it there instead."""
    if first:
        torch.mul(x_NF, y_NF, out=sum_NF)
    else:
        sum_NF.addcmul_(x_NF, y_NF)


def _with_last(d_BAF: Tensor) -> Tensor:
    """Fill in the last activation's gradient, which is the negative sum of the others, and swap the last two axes.

    d_BAF: gradient of the neurons' logits [B, A, F], or of the tokens' logits [B, A, T].
    """
    d_BAF[:, -1] = -d_BAF[:, :-1].sum(1)
    return d_BAF.transpose(1, 2)


_aten = torch.ops.aten
_VALUES = (  # `reference.ACTIVATIONS`, written into the second argument
    lambda g, out: torch.clamp(g, min=0, out=out),
    lambda g, out: torch.tanh(g, out=out),
    lambda g, out: _aten.silu.out(g, out=out),
    lambda g, out: _aten.gelu.out(g, out=out),
)
_SLOPES = (  # d times the derivative at g, where the value is h
    lambda d, g, h, out: _aten.threshold_backward.grad_input(d, g, 0, grad_input=out),
    lambda d, g, h, out: _aten.tanh_backward.grad_input(d, h, grad_input=out),
    lambda d, g, h, out: _aten.silu_backward.grad_input(d, g, grad_input=out),
    lambda d, g, h, out: _aten.gelu_backward.grad_input(d, g, grad_input=out),
)
