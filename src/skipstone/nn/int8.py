"""Linear layers and token embeddings with int8 weights, for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.nn.stored_weights import StoredLinear, StoredWeights
from skipstone.ops import int8


class Int8Weights(StoredWeights):
    """A layer with an int8 weight [O, I] and an fp32 scale for each row, or each group of inputs in it; a base class.

    O outputs (rows), I inputs. weight_scale: the scales, [O] or [O, I / group], which stay fp32 when the model's dtype
    changes. group: number of inputs that share a scale; None means one scale per row.
    """

    FORMAT, TYPE = "int8", "I8"
    group: int | None
    weight_scale: nn.Parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale.data = before.to(self.weight.device)
        return self

    def restored(self) -> Tensor:
        """Return the weight in floating point, [O, I] (outputs, inputs) in the model's dtype."""
        return int8.restore(self.weight, self.weight_scale, self.compute_dtype)

    def stored_floats(self) -> Tensor:
        """Return the scales, fp32 [O] or [O, I / group] for O outputs and I inputs; finite if the weight is."""
        return self.weight_scale

    def _add_scales(self, rows: int, columns: int, group: int | None) -> None:
        """Add the scales of a weight [rows, columns]; a group that does not divide its columns is not used."""
        self.group = group if group is not None and columns % group == 0 else None
        shape = (rows,) if self.group is None else (rows, columns // self.group)
        self.weight_scale = nn.Parameter(torch.ones(shape, dtype=torch.float32), requires_grad=False)


class Int8Linear(Int8Weights, StoredLinear):
    """A linear layer with int8 weights [O, I] and fp32 scales, for inference; parameters are filled in by loading.

    in_features, out_features: numbers of inputs I and outputs O. bias: whether there is a bias. group: number of inputs
    that share a scale; None, or a number that does not divide I, means one scale per output. On a CPU with numba, calls
    without gradients use the int8 weights directly, but only those of at most 8 tokens if I is no multiple of 64; other
    calls convert the weights, part by part, to the input's dtype.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, group: int | None = None) -> None:
        StoredLinear.__init__(
            self, torch.zeros(out_features, in_features, dtype=torch.int8), in_features, out_features, bias
        )
        self._add_scales(out_features, in_features, group)

    def product(self, x: Tensor) -> Tensor:
        """Return x (scale * weight)^T without bias, [..., O] in the dtype of x. x: [..., I] (I inputs, O outputs)."""
        return int8.linear(x, self.weight, self.weight_scale)


class Int8Embedding(Int8Weights):
    """A token embedding with int8 weights and fp32 scales, for inference; it restores the rows that are looked up.

    num_embeddings: vocabulary size. embedding_dim: features per token. padding_idx: id of the padding token or None,
    without effect. scale: a constant factor on the result. group: number of features that share a scale; None, or a
    number that does not divide `embedding_dim`, means one scale per token.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None,
        scale: float = 1.0,
        group: int | None = None,
    ) -> None:
        super().__init__(torch.zeros(num_embeddings, embedding_dim, dtype=torch.int8))
        self._add_scales(num_embeddings, embedding_dim, group)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        scale = functional.embedding(ids, self.weight_scale.reshape(self.num_embeddings, -1))  # IndexError if outside
        number = self.weight[ids].float().unflatten(-1, (scale.shape[-1], -1))
        x = (number * scale[..., None]).flatten(-2).to(self.compute_dtype)
        return x if self.scale == 1 else x * x.new_full((), self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"
