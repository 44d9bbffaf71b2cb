"""Linear layers with four-bit weights, for inference."""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.nn.stored_weights import StoredLinear
from skipstone.ops import int4


class Int4Linear(StoredLinear):
    """A linear layer with four-bit weights (`ops/int4.py`), for inference; parameters are filled in by loading.

    in_features, out_features: numbers of inputs I, a multiple of 64, and of outputs O. bias: whether there is a bias.
    The weight is uint8 [O, 5 I / 8], with scales and offsets in it. On a CPU with numba, calls without gradients use
    the weight as it is stored; other calls convert it, part by part, to the input's dtype.
    """

    FORMAT, TYPE = "int4", "U8"

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        numbers = torch.zeros(out_features, int4.row_bytes(in_features), dtype=torch.uint8)
        super().__init__(numbers, in_features, out_features, bias)

    def restored(self) -> Tensor:
        """Return the weight in floating point, [O, I] (outputs, inputs) in the model's dtype."""
        return int4.restore(self.weight, self.compute_dtype)

    def stored_floats(self) -> Tensor:
        """Return offsets and scales, fp16 [O, 2 G] for O outputs, G groups of inputs; finite if the weight is."""
        return int4.factors(self.weight)

    def product(self, x: Tensor) -> Tensor:
        """Return x weight^T without the bias, [..., O] in the dtype of x. x: [..., I], for I inputs and O outputs."""
        return int4.linear(x, self.weight)
