"""Linear layers and token embeddings with int8 weights, and linear layers with four-bit ones, for inference."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.core.routing_module import RoutingModule
from skipstone.nn.embedding import ScaledEmbedding
from skipstone.ops import int4, int8

UNTRAINED = "{} weights cannot be trained; train the original model, then quantise it"


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
            raise ValueError(UNTRAINED.format("int8"))
        y = int8.linear(x, self.weight, self.weight_scale)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"


class Int4Linear(nn.Module):
    """A linear layer with four-bit weights (`ops/int4.py`), for inference; parameters are filled in by loading.

    in_features, out_features: numbers of inputs I, a multiple of 64, and of outputs O. bias: whether there is a bias.
    The weight is uint8 [O, 5 I / 8], with scales and offsets in it, so no change of the model's dtype reaches them; it
    is not trainable. Few tokens use it as it is stored, as in `Int8Linear`. compute_dtype: the dtype of the model
    around it.
    """

    like: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        numbers = torch.zeros(out_features, int4.row_bytes(in_features), dtype=torch.uint8)
        self.weight = nn.Parameter(numbers, requires_grad=False)
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None
        self.register_buffer("like", torch.empty(0), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        return self.like.dtype

    def restored(self) -> Tensor:
        """Return the weight in floating point, in the model's dtype."""
        return int4.restore(self.weight, self.compute_dtype)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and torch.is_grad_enabled():
            raise ValueError(UNTRAINED.format("int4"))
        y = int4.linear(x, self.weight)
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
    _replace(module, group, None, "")


def int4_layers(module: nn.Module, group: int | None, but: Collection[str]) -> None:
    """Replace all linear layers below `module` by four-bit layers, in place, and others by int8 ones as `int8_layers`.

    Int8 are the token embedding, layers whose number of inputs is no multiple of 64, and those named in `but` (by their
    path below `module`). group: as in `int8_layers`, for these. Raises ValueError for a name that is none of a layer.
    """
    _replace(module, group, but, "")
    named = dict(module.named_modules())
    for name in but:
        if not isinstance(named.get(name), Int8Linear):
            raise ValueError(f"weight_int8 names {name!r}, which is no matrix of the model's blocks")


def _replace(module: nn.Module, group: int | None, but: Collection[str] | None, path: str) -> None:
    for name, child in module.named_children():
        if isinstance(child, RoutingModule):
            continue
        if isinstance(child, nn.Linear):
            sizes = child.in_features, child.out_features, child.bias is not None
            four = but is not None and int4.serves(child.in_features) and path + name not in but
            setattr(module, name, Int4Linear(*sizes) if four else Int8Linear(*sizes, group))
        elif isinstance(child, nn.Embedding) and name == "embed_tokens":
            factor = child.scale if isinstance(child, ScaledEmbedding) else 1.0
            places = child.num_embeddings, child.embedding_dim
            setattr(module, name, Int8Embedding(*places, child.padding_idx, factor, group))
        else:
            _replace(child, group, but, f"{path}{name}.")
