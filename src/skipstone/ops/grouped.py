"""A mixture of experts by grouped matrix products: `reference.apply_experts`, computing each choice once.

Choices are sorted by expert, so that each expert's tokens are contiguous; choices of no expert (no-ops) come last,
outside of every group. The host never waits, and every sum has a fixed order. Widths must be multiples of 8, because
the kernels require rows of a multiple of 16 bytes.

Shape letters: N tokens, C choices of a token, S = N C sorted choices, X experts, D width, F neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """Return the outputs [N, D] of a mixture of experts, computing each choice once by grouped matrix products.

        y_n = sum_c weight_nc down_e(act(gate_e x_n) * up_e x_n), e = expert_nc

    x_ND: inputs of N tokens. expert_NC: int64, the C experts that each token chose. weight_NC: the factors on these
    experts' outputs. idle_NC: bool, choices that add nothing; None means there are none. gate_XFD, up_XFD, down_XDF:
    weights of X experts of F neurons; D and F are multiples of 8. activation: the function act. The result has the
    dtype of the products, which follows autocast.
    """
    dtype = _product_dtype(gate_XFD)
    key_NC = expert_NC if idle_NC is None else torch.where(idle_NC, len(gate_XFD), expert_NC)
    sorted_S, order_S = key_NC.flatten().sort(stable=True)
    place_NC = order_S.argsort().view_as(expert_NC)  # index of each choice in the sorted order
    experts_X = torch.arange(len(gate_XFD), device=x_ND.device)
    end_X = torch.searchsorted(sorted_S, experts_X, right=True).to(torch.int32)

    def product(x: Tensor, weight: Tensor) -> Tensor:
        return F.grouped_mm(x, weight.to(dtype).transpose(1, 2), offs=end_X)

    x_SD = _Spread.apply(x_ND.to(dtype), order_S, place_NC, idle_NC)
    y_SD = product(activation(product(x_SD, gate_XFD)) * product(x_SD, up_XFD), down_XDF)
    y_NCD = _Collect.apply(y_SD, order_S, place_NC, idle_NC)
    return (y_NCD * weight_NC[..., None].to(dtype)).sum(1)


def _product_dtype(weight: Tensor) -> torch.dtype:
    """Return the dtype in which F.linear would multiply with `weight`; autocast does not cover grouped products."""
    device = weight.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype


def _at(x_SD: Tensor, place_NC: Tensor, idle_NC: Tensor | None) -> Tensor:
    """Return the rows of x_SD that belong to each token's choices, [N, C, D]; 0 for idle choices.

    place_NC: int64, the place of each choice in sorted order. idle_NC: bool, or None; the products leave the rows of
    idle choices uninitialised.
    """
    x_NCD = x_SD.index_select(0, place_NC.flatten()).view(*place_NC.shape, -1)
    return x_NCD if idle_NC is None else x_NCD.masked_fill_(idle_NC[..., None], 0.0)


class _Spread(torch.autograd.Function):
    """Copy each token once per choice, in sorted order. The backward pass sums by gathering, so its order is fixed."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, order_S: Tensor, place_NC: Tensor, idle_NC: Tensor | None) -> Tensor:
        ctx.save_for_backward(place_NC, idle_NC)
        return x_ND.index_select(0, order_S // place_NC.shape[1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_SD: Tensor) -> tuple[Tensor, None, None, None]:
        place_NC, idle_NC = ctx.saved_tensors
        return _at(grad_SD, place_NC, idle_NC).sum(1), None, None, None


class _Collect(torch.autograd.Function):
    """Bring sorted choices back into the order of tokens."""

    @staticmethod
    def forward(ctx: Any, y_SD: Tensor, order_S: Tensor, place_NC: Tensor, idle_NC: Tensor | None) -> Tensor:
        ctx.save_for_backward(order_S)
        return _at(y_SD, place_NC, idle_NC)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NCD: Tensor) -> tuple[Tensor, None, None, None]:
        (order_S,) = ctx.saved_tensors
        return grad_NCD.flatten(0, 1).index_select(0, order_S), None, None, None
