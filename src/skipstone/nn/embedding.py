"""A token embedding with a constant factor on its output."""

from __future__ import annotations

from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """A token embedding whose output is multiplied by a constant, as in Gemma.

    tokens: vocabulary size. width: features per token. padding_idx: id of the padding token, whose row gets no
    gradient; None means no such row. scale: the constant, rounded to the dtype of the weights before it is applied.
    """

    def __init__(self, tokens: int, width: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(tokens, width, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        y_BTD = super().forward(input)
        return y_BTD * y_BTD.new_full((), self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"
