"""Base classes of layers whose weights are stored in a compact format (int8, int4 or 16 bits) and cannot be trained."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from skipstone.ops.reference import autocast

UNTRAINED = "{} weights cannot be trained; train the original model, then quantise it"


class StoredWeights(nn.Module):
    """A layer whose weight is stored in a compact format and cannot be trained; the base class of these layers.

    weight: a parameter of an integer dtype, which no change of the model's dtype reaches. FORMAT: name of the format,
    for errors. TYPE: how a safetensors file names the dtype of `weight`. NUMBERS: what `stored_floats` returns, for
    errors. like: an empty buffer that has the dtype of the model around the layer (`compute_dtype`).
    """

    FORMAT: ClassVar[str]
    TYPE: ClassVar[str]
    NUMBERS: ClassVar[str] = "a scale"
    weight: nn.Parameter
    like: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.register_buffer("like", torch.empty(0), persistent=False)

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype of the model around the layer."""
        return self.like.dtype

    @abstractmethod
    def restored(self) -> Tensor:
        """Return the weight in floating point, [outputs, inputs] in the model's dtype.

        It is only to be read: if the weight is stored in this dtype, it is no copy.
        """

    @abstractmethod
    def stored_floats(self) -> Tensor:
        """Return those stored numbers that are floating point, as a tensor, such as the scales of an int8 weight.

        The weight is finite only if they are; loaded models are checked by them.
        """

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        """Load as torch does, but refuse a weight of another dtype, which it would cast: fractions would become 0."""
        given = state_dict.get(f"{prefix}weight")
        if isinstance(given, Tensor) and given.dtype != self.weight.dtype:
            error_msgs = others[-1]
            error_msgs.append(f"{prefix}weight has dtype {given.dtype}, and the model's is {self.weight.dtype}.")
            return
        super()._load_from_state_dict(state_dict, prefix, *others)

    def refuse_training(self) -> None:
        """Raise ValueError if the module is in training mode with gradients: its weight cannot be trained."""
        if self.training and torch.is_grad_enabled():
            raise ValueError(UNTRAINED.format(self.FORMAT))


class StoredLinear(StoredWeights):
    """A linear layer whose weight is stored in a compact format; the base class of these layers.

    in_features, out_features: numbers of inputs and outputs. bias: whether there is a bias, in the model's dtype.
    """

    def __init__(self, weight: Tensor, in_features: int, out_features: int, bias: bool) -> None:
        super().__init__(weight)
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.zeros(out_features)) if bias else None

    @abstractmethod
    def product(self, x: Tensor) -> Tensor:
        """Return x weight^T without the bias, [..., out_features] in the dtype of x. x: [..., in_features]."""

    def forward(self, x: Tensor) -> Tensor:
        self.refuse_training()
        y = self.product(autocast(x))  # which covers ordinary products, but not the compiled ones
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
