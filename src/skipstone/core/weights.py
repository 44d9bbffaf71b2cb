"""May the weight of a linear layer be used without calling the layer? One answer for every place that would."""

from __future__ import annotations

from torch import Tensor, nn


def weight_is_readable(linear: nn.Module) -> bool:
    """Whether a product by the weight alone is what calling the layer would compute.

    Not so where something acts in the layer's place or around its call, and would be passed by: an adapter (another
    forward), a parametrisation (a weight that is computed), hooks (accelerate's offloading, an observer), a forward
    that was replaced, a weight that is a shard or lies nowhere (meta). A quantised weight passes; see `is_quantised`.
    """
    if type(linear).forward is not nn.Linear.forward or "forward" in vars(linear):
        return False
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return False
    weight = linear.weight
    return weight.device.type != "meta" and (type(weight) is nn.Parameter or is_quantised(linear))


def is_quantised(linear: nn.Module) -> bool:
    """Whether the weight stands for other numbers than it holds (torchao)."""
    weight = linear.weight
    return isinstance(weight, Tensor) and type(weight).dequantize is not Tensor.dequantize
