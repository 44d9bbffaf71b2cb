"""Rotary position embeddings.

Shape letters: B rows, T tokens, E head size.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from skipstone.core.strict import PlainDict
from skipstone.nn.own_dtype import OwnDtype

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
ROPES = (*STATIC_ROPE, "longrope")


class Rotary(OwnDtype):
    """Rotary position embeddings: cos and sin of the angles (arXiv 2104.09864), half-split layout.

    config: a transformers configuration; its `rope_parameters` name the kind of scaling. parameters: replaces these
    `rope_parameters`; None means the configuration's own. With `partial_rotary_factor` p, only the first p E of the E
    features of a head are rotated. Kind "longrope" (arXiv 2402.13753) has two sets of frequencies; a call uses the set
    for long rows if one of its positions is at least `original_max_position_embeddings`. inverse_E2: fp32, a frequency
    for each pair of rotated features; it stays fp32 when the model's dtype changes, because in bf16 an angle would be
    off by whole turns after a few thousand tokens. long_E2: the same for long rows, absent for other kinds.
    """

    inverse_E2: Tensor
    long_E2: Tensor

    def __init__(self, config: PreTrainedConfig, parameters: PlainDict | None = None) -> None:
        super().__init__()
        if parameters is not None:
            config = copy.copy(config)
            config.rope_parameters = dict(parameters)
        self.config = config
        self.border = None if self.kind != "longrope" else config.rope_parameters["original_max_position_embeddings"]
        inverse_E2, self.scale = self._frequencies()
        self.register_buffer("inverse_E2", inverse_E2, persistent=False)
        if self.border is not None:
            self.register_buffer("long_E2", self._frequencies(self.border + 1)[0], persistent=False)

    @property
    def kind(self) -> str:
        """The kind of frequency scaling, `rope_type` of transformers."""
        return self.config.rope_parameters.get("rope_type", "default")  # type: ignore[no-any-return]

    def _frequencies(self, length: int | None = None) -> tuple[Tensor, float]:
        rope = self.config.rope_parameters
        if self.kind == "default":
            turned = int(self.config.head_dim * rope.get("partial_rotary_factor", 1.0))
            even = torch.arange(0, turned, 2, dtype=torch.float)
            return 1.0 / rope["rope_theta"] ** (even / turned), 1.0
        return ROPE_INIT_FUNCTIONS[self.kind](self.config, seq_len=length)

    def reset_parameters(self) -> None:
        """Compute the rotary frequencies anew from the configuration."""
        init.copy_(self.inverse_E2, self._frequencies()[0])
        if self.border is not None:
            init.copy_(self.long_E2, self._frequencies(self.border + 1)[0])

    @torch.no_grad()
    def forward(self, position_BT: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the rotary angles, [B, T, E] each in `dtype`, as `ops.rotate` expects them.

        position_BT: int64 positions of the tokens. E: number of rotated features of a head. Angles are computed in
        fp32, or fp64 if `dtype` is; the first half of sin is negated.
        """
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        inverse_E2 = self.inverse_E2
        if self.border is not None:
            inverse_E2 = torch.where(position_BT.max() >= self.border, self.long_E2, inverse_E2)
        angle = position_BT[..., None].to(wide) * inverse_E2.to(wide)
        cos, sin = angle.cos(), angle.sin()
        if self.scale != 1:
            cos, sin = cos * self.scale, sin * self.scale
        return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((-sin, sin), dim=-1).to(dtype)
