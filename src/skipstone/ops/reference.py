"""The specification of every tensor function, in plain PyTorch.

Shape letters: B rows, T tokens given, K tokens kept, H heads, E head size, D width, F neurons, A activations,
N tokens of all rows, C choices of a token, X experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

# 0.29 * 100 is 28.999999999999996 in floating point: the quota is 29. A factor, not a summand: then the quotas of the
# documents of a row never add up to more than the quota of the row, which is how many columns are gathered.
ROUNDING = 1 + 1e-9


def quota(capacity: float, length: int) -> int:
    """How many of `length` tokens a block of this capacity keeps: floor(capacity * length). The one rounding rule."""
    return math.floor(capacity * length * ROUNDING)


def rotate(x_BHTE: Tensor, cos_BTE: Tensor, sin_BTE: Tensor) -> Tensor:
    """Rotary position embedding, half-split layout (RoFormer, arXiv 2104.09864; pairs are (i, i + E/2)).

    The first half of `sin_BTE` comes negated, so that turning a pair needs no copy with another sign.
    """
    cos_B1TE, sin_B1TE = cos_BTE.unsqueeze(1), sin_BTE.unsqueeze(1)
    return x_BHTE * cos_B1TE + x_BHTE.roll(x_BHTE.shape[-1] // 2, -1) * sin_B1TE


def gather_rows(x_BTD: Tensor, index_BK: Tensor) -> Tensor:
    """x[b, index[b, k]] of shape [B, K, ...]; any number of trailing axes, none included."""
    if x_BTD.shape[0] == 1:  # all rows agree: nothing is repeated
        return x_BTD[0].index_select(0, index_BK.flatten()).view(*index_BK.shape, *x_BTD.shape[2:])
    offset_B1 = torch.arange(x_BTD.shape[0], device=index_BK.device)[:, None] * x_BTD.shape[1]
    flat = x_BTD.reshape(-1, *x_BTD.shape[2:]).index_select(0, (index_BK + offset_B1).flatten())
    return flat.view(*index_BK.shape, *x_BTD.shape[2:])


def scatter_rows(y_BKD: Tensor, index_BK: Tensor, length: int, fill: float = 0.0) -> Tensor:
    """[B, length, ...] with y at index and `fill` elsewhere: undoes `gather_rows`. Indices of a row are distinct."""
    B, _, *rest = y_BKD.shape
    offset_B1 = torch.arange(B, device=index_BK.device)[:, None] * length
    base = y_BKD.new_full((B * length, *rest), fill)
    flat = base.index_copy_(0, (index_BK + offset_B1).flatten(), y_BKD.reshape(-1, *rest))
    return flat.view(B, length, *rest)


def compact(kept_BT: Tensor, width: int) -> Tensor:
    """Indices [B, width] of the kept tokens of each row in order of slot, followed by tokens that were not kept."""
    return kept_BT.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :width]


def select_top(score_BT: Tensor, capacity: float, group_BT: Tensor | None = None) -> Tensor:
    """Expert choice along the row (Mixture-of-Depths, arXiv 2404.02258, section 3.3): bool mask of the best tokens.

    Every group keeps `quota(capacity, its length)` tokens with the highest score; ties go to the earlier token, for a
    selection by value would keep too many (in bf16 most rows have ties). `group_BT` holds the document of each token,
    negative for padding, which is never kept; without it the row is one group.
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
    """Start and length of the run of equal values that each entry belongs to."""
    T = sorted_BT.shape[1]
    at_T = torch.arange(T, device=sorted_BT.device)
    change_BT = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    start_BT = torch.where(F.pad(change_BT, (1, 0), value=True), at_T, 0).cummax(1).values
    end_BT = torch.where(F.pad(change_BT, (0, 1), value=True), at_T + 1, T).flip(1).cummin(1).values.flip(1)
    return start_BT, end_BT - start_BT


def wide_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if any of the tensors is, else fp32: what is computed more precisely than bf16 never loses precision."""
    double = any(x is not None and x.dtype == torch.float64 for x in tensors)
    return torch.float64 if double else torch.float32


def wide(x: Tensor) -> Tensor:
    """x in fp32, or as it is in fp64."""
    return x if x.dtype == torch.float64 else x.float()


def added(x: Tensor, update: Tensor) -> Tensor:
    """x + update. An fp32 stream and a bf16 update are first made one type: adding them as they are is ten times as
    slow on a CPU, and the values are the same."""
    return x + (update.float() if x.dtype == torch.float32 else update)


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout; without a module, whose call is felt in decoding."""
    return F.dropout(x, probability, training) if probability else x


def autocast(x: Tensor) -> Tensor:
    """x in the type that autocast makes of it: several products of it then keep one copy for the backward pass."""
    kind = x.device.type
    casts = torch.is_autocast_enabled(kind) and x.dtype != torch.float64  # which autocast leaves alone, too
    return x.to(torch.get_autocast_dtype(kind)) if casts else x


def linear_fp32(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear in fp32 (fp64 if any operand is) whatever autocast says."""
    if not torch.is_autocast_enabled(x.device.type):  # the context below costs as much as a small product
        if x.dtype == weight.dtype == torch.float32:
            return F.linear(x, weight, bias)
        return _wide_linear(x, weight, bias)
    with torch.autocast(x.device.type, enabled=False):
        return _wide_linear(x, weight, bias)


def _wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = wide_dtype(x, weight)
    return F.linear(x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


EPSILON = 1e-6  # as in the decoder's norms: an input of zeros stays zero


def inverse_rms(x: Tensor) -> Tensor:
    """1 / root mean square over the last axis, fp32 [..., 1]."""
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide_dtype(x))  # one pass; F.rms_norm takes four
    return torch.rsqrt(length.square() / x.shape[-1] + EPSILON)


def normalised(x: Tensor) -> Tensor:
    """x by its root mean square, in fp32, without parameters: scores then follow direction, not the stream's growth."""
    return wide(x) * inverse_rms(x)


def score_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: bool = False) -> Tensor:
    """`linear_fp32`, of the normalised x where `norm`. The norm is divided by behind the product, which is smaller."""
    if not norm:
        return linear_fp32(x, weight, bias)
    y = linear_fp32(x, weight) * inverse_rms(x)
    return y if bias is None else y + wide(bias)


ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (
    F.relu,
    torch.tanh,
    F.silu,
    F.gelu,
)  # PolyGLU's palette in the paper's order; GELU by erf


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """sum_k softmax_k((static + dynamic) / temperature) act_k(gate) (PolyGLU, arXiv 2603.13347).

    `static_BFA` is [1 or B, F, A] (preference of each neuron, with the Gumbel noise of the row where there is any);
    `dynamic_BTA` is [B, 1 or T, A]. Softmax in fp32; the result has the gate's dtype and shape [B, T, F].
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
    """y_n = sum_c weight_nc down_e(act(gate_e x_n) * up_e x_n), e = expert_nc: a mixture of SwiGLU experts [N, D].

    Choices of a token are distinct experts. `idle_NC` marks choices that add nothing (padding, no-ops), whatever their
    expert and weight say; None: there are none.
    """
    y_ND = torch.zeros_like(x_ND)
    for e, (gate_FD, up_FD, down_DF) in enumerate(zip(gate_XFD, up_XFD, down_XDF, strict=True)):
        chosen_NC = expert_NC == e if idle_NC is None else (expert_NC == e) & ~idle_NC
        weight_N = torch.where(chosen_NC, weight_NC, 0.0).sum(1).to(x_ND.dtype)
        hidden_NF = activation(F.linear(x_ND, gate_FD)) * F.linear(x_ND, up_FD)
        y_ND = y_ND + F.linear(hidden_NF, down_DF) * weight_N[:, None]
    return y_ND
