"""Linear layers and token embeddings with int8 weights, for inference."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.core.routing_module import RoutingModule
from skipstone.nn.embedding import ScaledEmbedding
from skipstone.ops import int8


class _Int8(nn.Module):
    """An int8 weight [O, I] with an fp32 scale for each row, or for each group of inputs in it.

    The weight is not trainable, and scales stay fp32 when the model's dtype changes. rows, columns: O and I. group:
    number of inputs that share a scale; None, or a number that does not divide I, means one scale per row. like: an
    empty buffer that has the dtype of the model around it (`compute_dtype`).
    """

    like: Tensor

    def __init__(self, rows: int, columns: int, group: int | None) -> None:
        super().__init__()
        self.group = group if group is not None and columns % group == 0 else None
        self.weight = nn.Parameter(torch.zeros(rows, columns, dtype=torch.int8), requires_grad=False)
        shape = (rows,) if self.group is None else (rows, columns // self.group)
        self.weight_scale = nn.Parameter(torch.ones(shape, dtype=torch.float32), requires_grad=False)
        self.register_buffer("like", torch.empty(0), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.like.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        before = self.weight_scale.data
        super()._apply(fn, recurse)
        if self.weight_scale.dtype != torch.float32:
            self.weight_scale.data = before.to(self.weight.device)
        return self

    def restored(self) -> Tensor:
        """Return the weight in floating point, in the model's dtype."""
        return int8.restore(self.weight, self.weight_scale, self.compute_dtype)


class Int8Linear(_Int8):
    """A linear layer with int8 weights [O, I] and fp32 scales, for inference; parameters are filled in by loading.

    in_features, out_features: I and O. bias: whether there is a bias. group: number of inputs that share a scale; None,
    or a number that does not divide I, means one scale per output. On a CPU with numba, calls of at most 8 tokens use
    the int8 weights directly; other calls convert the weights, part by part, to the input's dtype.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, group: int | None = None) -> None:
        super().__init__(out_features, in_features, group)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise ValueError("int8 weights cannot be trained; train the original model, then quantise it")
        y = int8.linear(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int8Embedding(_Int8):
    """A token embedding with int8 weights and fp32 scales, for inference; it restores the rows that are looked up.

    num_embeddings: vocabulary size. embedding_dim: features per token. padding_idx: id of the padding token or None; it
    has no effect. scale: a constant factor on the result. group: number of features that share a scale; None, or a
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
        super().__init__(num_embeddings, embedding_dim, group)
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.scale = scale

    def forward(self, ids: Tensor) -> Tensor:
        scale = functional.embedding(ids, self.weight_scale.reshape(self.num_embeddings, -1))  # IndexError if outside
        number = self.weight[ids].float().unflatten(-1, (scale.shape[-1], -1))
        x = (number * scale[..., None]).flatten(-2).to(self.compute_dtype)
        return x if self.scale == 1 else x * x.new_full((), self.scale)

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}"


def int8_layers(module: nn.Module, group: int | None) -> None:
    """Replace all linear layers and the token embedding inside `module` by int8 layers, in place.

    Layers of mechanisms are left alone. The new layers have placeholder weights, to be filled in by loading a state
    dict. group: number of inputs that share a scale; None means one scale per output.
    """
    for name, child in module.named_children():
        if isinstance(child, RoutingModule):
            continue
        if isinstance(child, nn.Linear):
            setattr(module, name, Int8Linear(child.in_features, child.out_features, child.bias is not None, group))
        elif isinstance(child, nn.Embedding) and name == "embed_tokens":
            factor = child.scale if isinstance(child, ScaledEmbedding) else 1.0
            sizes = child.num_embeddings, child.embedding_dim
            setattr(module, name, Int8Embedding(*sizes, child.padding_idx, factor, group))
        else:
            int8_layers(child, group)
