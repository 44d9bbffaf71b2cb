"""A linear layer with weights in fp32, bf16 or fp16 for few tokens, by `decode_products_native.single_rows`."""

from __future__ import annotations

from torch import Tensor

from skipstone.ops.decode_products_native import single_rows
from skipstone.ops.decode_stack import FLOATS
from skipstone.ops.int8_linear_native import multiplied


def linear(x: Tensor, weight_OI: Tensor) -> Tensor:
    """Return x weight^T, [..., O] in the dtype of x, reading each weight from memory once.

    x: [..., I], meant for few tokens, with no limit. weight_OI: fp32, bf16 or fp16, I a multiple of 32.
    """
    weight_OI, (outputs, inputs) = weight_OI.contiguous(), weight_OI.shape
    matrix = (weight_OI.data_ptr(), 0, 0, FLOATS[weight_OI.dtype])
    return multiplied(x, single_rows, matrix, (outputs, inputs), rounded=False)
