"""Embeddings of tokens."""

from __future__ import annotations

from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """An embedding times a constant, which is rounded to the weights' type first, as Gemma does."""

    def __init__(self, tokens: int, width: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(tokens, width, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        y_BTD = super().forward(input)
        return y_BTD * y_BTD.new_full((), self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"
