"""Every tensor function in plain PyTorch: the specification, which faster forms must equal.

Shape letters: B rows, T tokens given, K tokens kept, H heads, E head size, D width, F neurons, A activations, N tokens
of all rows, C choices of a token, X experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

# 0.29 * 100 is 28.999999999999996 in floating point, but the quota is 29. A factor and not an added constant, so that
# the quotas of a row's documents never add up to more than the row's quota, the number of columns gathered.
ROUNDING = 1 + 1e-9
LARGEST_HALF = 65504.0  # the largest number of fp16


def quota(capacity: float, length: int) -> int:
    """Return how many of `length` tokens are kept at this capacity: floor(capacity * length).

    capacity: the share of the tokens to keep, in [0, 1]. Products that floating point puts just below an integer are
    rounded to it.
    """
    return math.floor(capacity * length * ROUNDING)


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Apply rotary position embedding, half-split layout (RoFormer, arXiv 2104.09864; pairs are (i, i + E/2)).

    x_BHTE: queries or keys (rows, heads, tokens, features of a head). cos_BTE, sin_BTE: cosine and sine of the rotary
    angles; the first half of sin is already negated, so that rotating a pair needs no sign change. If they have fewer
    than E features, only the first ones of a head are rotated. Returns [B, H, T, E].
    """
    turned = cos_BTE.shape[-1]
    if turned < x_BHTE.shape[-1]:
        rest_BHTE = x_BHTE[..., turned:]
        return torch.cat((rotate(x_BHTE[..., :turned], cos_BTE, sin_BTE), rest_BHTE), dim=-1)
    cos_B1TE, sin_B1TE = cos_BTE.unsqueeze(1), sin_BTE.unsqueeze(1)
    return x_BHTE * cos_B1TE + x_BHTE.roll(x_BHTE.shape[-1] // 2, -1) * sin_B1TE


def to_half(x: Tensor) -> Tensor:
    """Return x in fp16, rounded to the nearest number, ties to even; what fp16 cannot hold becomes 65,504 or -65,504.

    Numbers below 2^-14 are rounded to multiples of 2^-24, all others within 2^-11 of their size. NaN stays NaN.
    """
    return x.clamp(-LARGEST_HALF, LARGEST_HALF).to(torch.float16)


def gather_rows(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """Return x[b, index[b, k]], [B, K, ...]: K entries of each row.

    x_BTD: [B, T, ...] with any number of trailing axes, or none; B = 1 if all rows are equal. index_BK: int64.
    """
    if x_BTD.shape[0] == 1:  # all rows are equal and need not be repeated
        return x_BTD[0].index_select(0, index_BK.flatten()).view(*index_BK.shape, *x_BTD.shape[2:])
    offset_B1 = torch.arange(x_BTD.shape[0], device=index_BK.device)[:, None] * x_BTD.shape[1]
    flat = x_BTD.reshape(-1, *x_BTD.shape[2:]).index_select(0, (index_BK + offset_B1).flatten())
    return flat.view(*index_BK.shape, *x_BTD.shape[2:])


def scatter_rows(y_BKD: Tensor, index_BK: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """Invert `gather_rows`: return [B, length, ...] with y at `index_BK` and `fill` elsewhere.

    y_BKD: [B, K, ...]. index_BK: int64, distinct within a row (not checked). length: number of entries per row of the
    result.
    """
    B, _, *rest = y_BKD.shape
    offset_B1 = torch.arange(B, device=index_BK.device)[:, None] * length
    base = y_BKD.new_full((B * length, *rest), fill)
    flat = base.index_copy_(0, (index_BK + offset_B1).flatten(), y_BKD.reshape(-1, *rest))
    return flat.view(B, length, *rest)


def compact(kept_BT: Tensor, width: int) -> Tensor:
    """Return the indices [B, width] of each row's kept tokens in ascending order, followed by those of other tokens.

    kept_BT: bool [B, T] (rows, tokens). width: number of indices per row; if a row keeps more tokens, only the first
    `width` are returned.
    """
    return kept_BT.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]


def select_top(score_BT: Tensor, capacity: float, group_BT: Tensor | None = None) -> Tensor:
    """Return a bool mask [B, T] of the highest-scoring tokens of each row (Mixture-of-Depths, arXiv 2404.02258).

    score_BT: one score per token. capacity: share of each group's tokens to keep, rounded down (`quota`). group_BT: the
    document of each token, negative for padding, which is never kept; None means that each row is one group. Ties go to
    the earlier token: comparing with the k-th score would keep too many, because in bf16 most rows have ties.
    """
    order_BT = score_BT.argsort(dim=1, descending=True, stable=True)
    kept_BT = torch.zeros_like(score_BT, dtype=torch.bool)
    if group_BT is None:
        return kept_BT.scatter(1, order_BT[:, : quota(capacity, score_BT.shape[1])], True)
    group_BT = group_BT.expand_as(score_BT)
    order_BT = order_BT.gather(1, group_BT.gather(1, order_BT).argsort(dim=1, stable=True))
    sorted_BT = group_BT.gather(1, order_BT)
    start_BT, length_BT = _runs(sorted_BT)
    rank_BT = torch.arange(score_BT.shape[1], device=score_BT.device) - start_BT
    quota_BT = (length_BT.double() * capacity * ROUNDING).floor()
    return kept_BT.scatter(1, order_BT, (rank_BT < quota_BT) & (sorted_BT >= 0))


def _runs(sorted_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return start and length of the run of equal values around each entry of sorted rows, int64 [B, T] each."""
    T = sorted_BT.shape[1]
    at_T = torch.arange(T, device=sorted_BT.device)
    change_BT = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    start_BT = torch.where(F.pad(change_BT, (1, 0), value=True), at_T, 0).cummax(1).values
    end_BT = torch.where(F.pad(change_BT, (0, 1), value=True), at_T + 1, T).flip(1).cummin(1).values.flip(1)
    return start_BT, end_BT - start_BT


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Return fp64 if any of the tensors is fp64, else fp32: the dtype of computations for which bf16 is too coarse."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def wide(x: Tensor) -> Tensor:
    """Return x in fp32, or in fp64 if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def added(x: Tensor, update: Tensor) -> Tensor:
    """Return x + update, converting a bf16 update of an fp32 stream to fp32 first.

    The values are the same, but on a CPU, adding tensors of different dtypes is ten times as slow.
    """
    return x + (update.float() if x.dtype == torch.float32 else update)


def add_matmul(into: Tensor, a: Tensor, b: Tensor) -> None:
    """Add the matrix product a b to `into`, in place, without a second tensor of that size if their dtypes are equal.

    into: [M, N]. a: [M, K]. b: [K, N], in the dtype of a.
    """
    if into.dtype == a.dtype:
        torch.addmm(into, a, b, out=into)
    else:
        into.add_(torch.mm(a, b))


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    """Return x after dropout, x itself if `probability` is 0 or `training` False.

    It is a function because calling a dropout module takes noticeable time in decoding.
    """
    return F.dropout(x, probability, training) if probability else x


def under_autocast(device: str) -> bool:
    """Return whether autocast is on for a device type such as "cuda"; False for "meta", which has no autocast.

    device: the type of the device.
    """
    return device != "meta" and torch.is_autocast_enabled(device)


def without_autocast(device: str) -> AbstractContextManager[object]:
    """Return a context manager in which products on a type of device compute in their operands' dtype.

    device: the type, such as "cuda".
    """
    return torch.autocast(device, enabled=False) if under_autocast(device) else nullcontext()


def autocast(x: Tensor) -> Tensor:
    """Return x in the dtype of autocast, or x itself if autocast is off or x is fp64.

    Several products with the result then share one saved copy of it for the backward pass; otherwise each would save
    its own.
    """
    kind = x.device.type
    casts = under_autocast(kind) and x.dtype != torch.float64  # autocast does not convert fp64 either
    return x.to(torch.get_autocast_dtype(kind)) if casts else x


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x weight^T + bias in fp32 (fp64 if x or weight is), even under autocast.

    x: [..., I], I inputs. weight: [O, I], O outputs. bias: [O] or None. Returns [..., O].
    """
    if not under_autocast(x.device.type):  # the context below costs as much as a small product
        if x.dtype == weight.dtype == torch.float32:
            return F.linear(x, weight, bias)
        return _wide_linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _wide_linear(x, weight, bias)


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = wide_dtype(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


EPSILON = 1e-6  # as in the decoder's norms; keeps an input of zeros at zero


def inverse_rms(x: Tensor) -> Tensor:
    """Return 1 / sqrt(mean(x^2) + 1e-6) over the last axis, fp32 [..., 1] (fp64 for fp64)."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x))  # one pass; F.rms_norm takes four
    return torch.rsqrt(length.square() / x.shape[-1] + EPSILON)


def normalised(x: Tensor) -> Tensor:
    """Return x divided by its root mean square over the last axis, in fp32 (fp64 for fp64).

    Router scores computed from it depend on the direction of the residual stream only, not on its norm.
    """
    return wide(x) * inverse_rms(x)


def score_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: bool = False) -> Tensor:
    """Return a router's product x weight^T + bias in fp32, [..., O]; with `norm`, x is divided by its root mean square.

    x: [..., D] of any float dtype, D inputs. weight: [O, D], O outputs. bias: [O] or None. The division follows the
    product, which has fewer elements than x.
    """
    if not norm:
        return linear_fp32(x, weight, bias)
    y = linear_fp32(x, weight) * inverse_rms(x)
    return y if bias is None else y + wide(bias)


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    torch.tanh,
    F.silu,
    F.gelu,
)  # PolyGLU's activations in the paper's order; GELU is the exact one (erf)


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """Mix A activation functions for each neuron and token (PolyGLU, arXiv 2603.13347).

    The result is sum_k softmax_k((static + dynamic) / temperature) act_k(gate), with act = ReLU, tanh, SiLU, GELU.
    gate_BTF: pre-activations, [B, T, F] (rows, tokens, neurons). static_BFA: logits of each neuron, [1 or B, F, A];
    they may include Gumbel noise of the row. dynamic_BTA: logits of each token, [B, 1 or T, A]. temperature: a positive
    number. The softmax is fp32; the result has the gate's dtype and shape.
    """
    logits_BTFA = (wide(static_BFA)[:, None] + wide(dynamic_BTA)[:, :, None]) / temperature
    share_BTFA = logits_BTFA.softmax(-1).to(gate_BTF.dtype)
    values_BTFA = torch.stack([activation(gate_BTF) for activation in ACTIVATIONS], dim=-1)
    return (share_BTFA * values_BTFA).sum(-1)


def apply_experts(
    x_ND: Tensor,
    expert_NC: Tensor,
    weight_NC: Tensor,
    idle_NC: Tensor | None,
    gate_XFD: Tensor,
    up_XFD: Tensor,
    down_XDF: Tensor,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the outputs [N, D] of a mixture of SwiGLU experts.

    y_n = sum_c weight_nc down_e(act(gate_e x_n) * up_e x_n), e = expert_nc

    x_ND: inputs of N tokens. expert_NC: int64, the C experts that each token chose, distinct. weight_NC: the factors on
    these experts' outputs. idle_NC: bool, choices that add nothing (padding, no-ops), whatever their expert and weight;
    None means there are none. gate_XFD, up_XFD, down_XDF: weights of X experts of F neurons. activation: the function
    act.
    """
    y_ND = torch.zeros_like(x_ND)
    for e, (gate_FD, up_FD, down_DF) in enumerate(zip(gate_XFD, up_XFD, down_XDF, strict=True)):
        chosen_NC = expert_NC == e if idle_NC is None else (expert_NC == e) & ~idle_NC
        weight_N = torch.where(chosen_NC, weight_NC, 0.0).sum(1).to(x_ND.dtype)
        hidden_NF = activation(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD)
        y_ND = y_ND + F.linear(hidden_NF, down_DF) * weight_N[:, None]
    return y_ND
