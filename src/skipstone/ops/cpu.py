"""PolyGLU's mixture without its [B, T, F, A] tensor: meaning and signature of `reference`, less memory and time.

Saves nothing but its inputs and recomputes in backward, in chunks of tokens small enough to stay in the cache. A share
is a product of what the neuron says, s, and what the token says, c, so that no pair of them needs an exponential:

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

CHUNK_ELEMENTS = 1 << 15  # of one [N, F] tensor: with its companions 1.5 MB in fp32
# Nats below the largest logit. Of two parts one must stay within NEAR, or the tokens of a chunk that far from each
# other: their sum is then above e^-32 (e^-16), and what the other part has below FAR is less than e^-21 of it. FAR is
# put in its place, since products of smaller numbers are denormal and take many times as long.
NEAR, FAR = 32.0, -53.0


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """See `reference.mix_activations`; the temperature gets no gradient."""
    if gate_BTF.dtype == torch.float64:  # the chunks below are laid out for fp32
        return reference.mix_activations(gate_BTF, static_BFA, dynamic_BTA, temperature)
    static_BFA, dynamic_BTA = static_BFA.float() / temperature, dynamic_BTA.float() / temperature
    dynamic_BTA = dynamic_BTA.expand(*gate_BTF.shape[:2], -1)
    if static_BFA.shape[0] > 1:
        return _Mix.apply(gate_BTF, static_BFA, dynamic_BTA)  # type: ignore[no-any-return]
    # Rows that share their static part are one long row: fewer and fuller chunks, above all in decoding.
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
                _add_product(y_NF, w[k], h_NF, first=k == 0)
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
                _add_product(y_NF, w[k], h[k], first=k == 0)
            y_NF.div_(total_NF)
            work[:4].mul_(torch.div(grad[b, at].float(), total_NF, out=total_NF))  # dy p_k
            for k, slope in enumerate(_SLOPES):
                slope(w[k], g_NF, h[k], more_NF if k else d_NF)
                if k:
                    d_NF.add_(more_NF)
            d_gate[b, at] = d_NF
            d_logit_ANF = work[4:7].sub_(y_NF).mul_(work[:3])  # the last is the negative sum of the others
            d_static[b if len(d_static) > 1 else 0, :-1].add_(d_logit_ANF.sum(1))
            d_dynamic[b, :-1, at] = d_logit_ANF.sum(2)
        return d_gate, _with_last(d_static), _with_last(d_dynamic)


class _Products:
    """Shares as products, to be divided by their sum."""

    def __init__(self, static_BFA: Tensor, dynamic_BTA: Tensor) -> None:
        self.static_BAF = static_BFA.clamp(min=FAR).exp_().transpose(1, 2).contiguous()
        self.dynamic_BTA = dynamic_BTA.clamp(min=FAR).exp_()

    def weigh(self, b: int, at: slice, out_ANF: Tensor, total_NF: Tensor) -> None:
        """Write a chunk's parts and their sums."""
        static_AF = self.static_BAF[b if len(self.static_BAF) > 1 else 0]
        _multiply(static_AF, self.dynamic_BTA[b, at], out_ANF, total_NF)


class _Centred(_Products):
    """The same where both parts reach so far down that their exponentials vanish.

    Tokens of a chunk say nearly the same, for their contexts are means: what they have in common is added to what the
    neurons say, and the rest is near 0. Where it is not, sums are taken in place of products.
    """

    def __init__(self, static_BFA: Tensor, dynamic_BTA: Tensor) -> None:
        self.static_BAF, self.dynamic_BTA = static_BFA.transpose(1, 2).contiguous(), dynamic_BTA

    def weigh(self, b: int, at: slice, out_ANF: Tensor, total_NF: Tensor) -> None:
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
    torch.mul(dynamic_NA.T[:, :, None], static_AF[:, None], out=out_ANF)
    _add_up(out_ANF, total_NF)


def _add_up(x_ANF: Tensor, total_NF: Tensor) -> None:
    torch.add(x_ANF[0], x_ANF[1], out=total_NF).add_(x_ANF[2]).add_(x_ANF[3])


def _shares(static_BFA: Tensor, dynamic_BTA: Tensor) -> _Products:
    parts = [x - x.amax(-1, keepdim=True) for x in (static_BFA, dynamic_BTA)]
    return (_Products if any(map(_near, reversed(parts))) else _Centred)(*parts)


def _near(logits: Tensor) -> bool:
    """Whether all are, of logits that are at most 0; taken to be so where there are no numbers (fake tensors)."""
    if isinstance(logits, FakeTensor) or not logits.numel():
        return True
    return bool(logits.amin().numpy() >= -NEAR)  # by numpy, since a CPU waits for nobody


def _chunks(gate: Tensor, parts: int) -> Iterator[tuple[int, slice, Tensor, list[Tensor]]]:
    """Row and tokens of each chunk with memory for it, fp32 [parts, N, F], whole and in parts.

    It is the same memory for all, since what is allocated anew is not in the cache.
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


def _add_product(sum_NF: Tensor, x_NF: Tensor, y_NF: Tensor, *, first: bool) -> None:
    """The first one is what the sum starts from."""
    if first:
        torch.mul(x_NF, y_NF, out=sum_NF)
    else:
        sum_NF.addcmul_(x_NF, y_NF)


def _with_last(d_BAF: Tensor) -> Tensor:
    """[B, F or T, A], the last activation's being what the others leave."""
    d_BAF[:, -1] = -d_BAF[:, :-1].sum(1)
    return d_BAF.transpose(1, 2)


_aten = torch.ops.aten
_VALUES = (  # the palette of `reference.ACTIVATIONS`, into the second argument
    lambda g, out: torch.clamp(g, min=0, out=out),
    lambda g, out: torch.tanh(g, out=out),
    lambda g, out: _aten.silu.out(g, out=out),
    lambda g, out: _aten.gelu.out(g, out=out),
)
_SLOPES = (  # d times the slope at g, where the value is h
    lambda d, g, h, out: _aten.threshold_backward.grad_input(d, g, 0, grad_input=out),
    lambda d, g, h, out: _aten.tanh_backward.grad_input(d, h, grad_input=out),
    lambda d, g, h, out: _aten.silu_backward.grad_input(d, g, grad_input=out),
    lambda d, g, h, out: _aten.gelu_backward.grad_input(d, g, grad_input=out),
)
