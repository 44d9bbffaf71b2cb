"""Rotary position embeddings.

Shape letters: B rows, T tokens, E head size.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

STATIC_ROPE = ("default", "linear", "llama3", "yarn")


class Rotary(nn.Module):
    """Cos and sin of rotary angles (arXiv 2104.09864), half-split layout; scaled frequencies come from transformers."""

    inverse_E2: Tensor

    def __init__(self, config: PreTrainedConfig) -> None:
        super().__init__()
        self.config = config
        inverse_E2, self.scale = self._frequencies()
        self.register_buffer("inverse_E2", inverse_E2, persistent=False)

    def _frequencies(self) -> tuple[Tensor, float]:
        """Return the inverse frequencies [E/2] and the factor on cos and sin."""
        kind = self.config.rope_parameters["rope_type"]
        if kind == "default":
            even = torch.arange(0, self.config.head_dim, 2, dtype=torch.float)
            return 1.0 / self.config.rope_parameters["rope_theta"] ** (even / self.config.head_dim), 1.0
        return ROPE_INIT_FUNCTIONS[kind](self.config)

    def reset_parameters(self) -> None:
        init.copy_(self.inverse_E2, self._frequencies()[0])

    @torch.no_grad()
    def forward(self, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin [B, T, E] in `dtype`, computed in fp32 or fp64; the first half of sin is negated, for
        `ops.rotate`.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        angle = position_BT[..., None].to(wide) * self.inverse_E2.to(wide)
        cos, sin = angle.cos(), angle.sin()
        if self.scale != 1:
            cos, sin = cos * self.scale, sin * self.scale
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
