"""Linear layers and token embeddings with weights stored in bf16 or fp16 and multiplied in fp32, for inference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from skipstone.nn.stored_weights import StoredLinear, StoredWeights
from skipstone.ops import float16

FORMATS = {"bfloat16": torch.bfloat16, "float16": torch.float16}


class _Float16(StoredWeights):
    """A weight [O, I] in bf16 or fp16, stored as int16 of the same bits.

    So neither loading nor a change of the model's dtype converts it. stored: the dtype of the numbers, bf16 or fp16.
    """

    FORMAT, TYPE, NUMBERS = "16-bit", "I16", "a number"
    stored: torch.dtype

    @property
    def values(self) -> Tensor:
        """The weight in its own dtype, bf16 or fp16, without a copy."""
        return self.weight.view(self.stored)

    def restored(self) -> Tensor:
        """Return the weight in the model's dtype."""
        return self.values.to(self.compute_dtype)

    def stored_floats(self) -> Tensor:
        """Return the weight in its own dtype: it has no scales."""
        return self.values


class Float16Linear(_Float16, StoredLinear):
    """A linear layer with weights in bf16 or fp16, for inference; parameters are filled in by loading.

    in_features, out_features: numbers of inputs I and outputs O. bias: whether there is a bias. stored: dtype of the
    weights, bf16 or fp16. On a CPU with numba, calls of at most 8 tokens without gradients use the weights as they are,
    with sums in fp32, if I is a multiple of 32; other calls convert them, part by part, to the input's dtype.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, stored: torch.dtype) -> None:
        bits = torch.zeros(out_features, in_features, dtype=torch.int16)
        super().__init__(bits, in_features, out_features, bias)
        self.stored = stored

    def product(self, x: Tensor) -> Tensor:
        """Return x weight^T without the bias, [..., O] in the dtype of x. x: [..., I], for I inputs and O outputs."""
        return float16.linear(x, self.values)


class Float16Embedding(_Float16):
    """A token embedding with weights in bf16 or fp16, for inference; it converts the rows that are looked up.

    num_embeddings: vocabulary size. embedding_dim: features per token. padding_idx: id of the padding token or None,
    without effect. scale: a constant factor on the result. stored: dtype of the weights, bf16 or fp16.
    """

    def __init__(
        self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, scale: float, stored: torch.dtype
    ) -> None:
        super().__init__(torch.zeros(num_embeddings, embedding_dim, dtype=torch.int16))
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scale, self.stored = scale, stored

    def forward(self, ids: Tensor) -> Tensor:
        x = functional.embedding(ids, self.values).to(self.compute_dtype)
        return x if self.scale == 1 else x * x.new_full((), self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
