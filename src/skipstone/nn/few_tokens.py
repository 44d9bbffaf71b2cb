"""Products of a few tokens with a large fp32 matrix, such as the output head, without gradients.

PyTorch multiplies one token at the speed at which it reads the weights, but two or three at a half and a third of it.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn

from skipstone.core.weights import weight_is_readable
from skipstone.ops import float16
from skipstone.ops.int8 import FEW, in_place

LEAST = 2  # tokens
HAS_NUMBA = importlib.util.find_spec("numba") is not None  # asked here, as `in_place` warns of what int8 misses
LARGE = 2**20  # weights: a smaller matrix lies in the caches, and calling the kernel costs more than it saves


def multiplied(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x), computed by the kernel that reads each weight once where that is faster.

    That is so for 2 to 8 tokens in fp32, on a CPU with numba, without gradients, and for a plain linear layer of at
    least 2^20 weights whose number of inputs I is a multiple of 32; others are called as usual. The results are equal
    up to the order of sums. x: [..., I].
    """
    weight = getattr(layer, "weight", None)
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return layer(x)  # type: ignore[no-any-return]
    if not HAS_NUMBA or not isinstance(weight, Tensor) or weight.numel() < LARGE or weight.dim() != 2:
        return layer(x)  # type: ignore[no-any-return]
    if torch._C._len_torch_dispatch_stack():  # who counts operations asks in which layer they are
        return layer(x)  # type: ignore[no-any-return]
    few = LEAST * weight.shape[1] <= x.numel() and in_place(x, weight.shape[1], FEW)
    single = x.dtype == weight.dtype == torch.float32 and weight.is_contiguous() and weight.device.type == "cpu"
    if not few or not single or weight.shape[1] % float16.STEP or not weight_is_readable(layer):
        return layer(x)  # type: ignore[no-any-return]
    return float16.few_tokens(x, weight)
