"""Token embeddings."""

from __future__ import annotations

from torch import Tensor, nn


class ScaledEmbedding(nn.Embedding):
    """A token embedding multiplied by a constant, which is first rounded to the weights' dtype, as in Gemma."""

    def __init__(self, tokens: int, width: int, padding_idx: int | None, scale: float) -> None:
        super().__init__(tokens, width, padding_idx)
        self.scale = scale

    def forward(self, input: Tensor) -> Tensor:
        y_BTD = super().forward(input)
        return y_BTD * y_BTD.new_full((), self.scale)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, scale={self.scale:g}"
