"""Whether the weight of a linear layer may be used without calling the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def weight_is_readable(linear: nn.Module) -> bool:
    """Return whether multiplying by the layer's weight gives the same result as calling the layer.

    It does not if something acts in place of the layer or around its call: an adapter (another forward), a
    parametrisation (a computed weight), hooks (accelerate's offloading, an observer), a replaced forward, a sharded
    weight or one on the meta device. A quantised weight passes; see `is_quantised`.
    """
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    weight = linear.weight
    return weight.device.type != "meta" and (type(weight) is nn.Parameter or is_quantised(linear))


def compute_dtype(linear: nn.Module) -> torch.dtype:
    """Return the dtype of the layer's outputs, also for int8 weights."""
    dtype: torch.dtype = linear.weight.dtype if linear.weight.dtype.is_floating_point else linear.compute_dtype  # type: ignore[assignment, union-attr]
    return dtype


def whole(tensor: Tensor) -> Tensor:
    """Return a whole tensor for one that FSDP2 has sharded, and any other as it is; all processes call this."""
    found: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return found


def is_quantised(linear: nn.Module) -> bool:
    """Return whether the weight is quantised (torchao), so that its stored numbers are not its values."""
    weight = linear.weight
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize
