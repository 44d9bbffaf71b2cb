"""Token-Selective Attention (Mohammed 2026, arXiv 2605.05222).

    p_i = sigmoid(w2 . relu(W1 x_i + b1) + b2)              x the raw residual stream before the block
    h  <- h + (1 - p) * Attn(LN1(h))
    h  <- h + (1 - p) * FFN(LN2(h))                         one p for both
    loss = CE + depth_weight * mean over gated blocks and tokens of (1 - p)

Hard execution leaves tokens with p >= threshold out: no query, no output projection, no FFN; their keys and values are
computed from the carried-forward h, as in the paper. Where we differ: a kept token keeps its gain 1 - p by default
(`hard_gain: gate`); the paper's sparse mode gives it 1 (`hard_gain: one`), which costs up to .06 nats.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from skipstone.core.records import Records
from skipstone.core.seam import Update
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.base import DepthMechanism, Place, every
from skipstone.mechanisms.gating import gate, is_hard
from skipstone.mechanisms.routers import MLPRouter, hidden_width

NEUTRAL_SCORE = 9.0  # an open gate of 1 - 1.2e-4, whose gradient is still alive


@dataclass(frozen=True, kw_only=True)
class TokenSelectiveConfig:
    """start_bias: b2 before training (-1: p is .27). router_width: hidden width, default max(d / 4, 16).

    depth_weight: lambda of the depth loss. execution: what a causal pass does, hard (skip) or soft (scale only).
    threshold: p at and above which hard execution skips. hard_gain: gain of a kept token, gate (1 - p) or one.
    """

    start_bias: float = -1.0
    router_width: int | None = None
    depth_weight: float = 0.001
    execution: Literal["hard", "soft"] = "hard"
    threshold: float = 0.5
    hard_gain: Literal["gate", "one"] = "gate"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")
        if self.depth_weight < 0:
            raise ValueError(f"depth_weight must not be negative, got {self.depth_weight}")
        if self.router_width is not None and self.router_width < 1:
            raise ValueError(f"router_width must be at least 1, got {self.router_width}")


class TokenSelective(DepthMechanism):
    """A small gate per token scales a block's update or, executed hard, skips it."""

    Config = TokenSelectiveConfig

    def __init__(self, hidden_size: int, place: Place | None = None, **options: Any) -> None:
        super().__init__(hidden_size, place, **options)
        width = self.config.router_width or hidden_width(hidden_size)
        self.router = MLPRouter(hidden_size, width, self.config.start_bias)

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """The inner update, each token's gated by 1 - p."""
        halt_BT = self.router(x_BTD)  # logit of p
        open_BT, asked_BT = torch.sigmoid(-halt_BT), every(tokens, halt_BT)
        gain_BT: Tensor | None = open_BT
        kept_BT = None
        if is_hard(self.config.execution, tokens):
            kept_BT = asked_BT & (open_BT > 1 - self.config.threshold if tokens.forced_BT is None else tokens.forced_BT)
            gain_BT = open_BT if self.config.hard_gain == "gate" else None
        delta_BTD, inner = gate(update, x_BTD, tokens, gain_BT, kept_BT)
        shown_BT = asked_BT if kept_BT is None else kept_BT
        records = self.record(
            score_BT=-halt_BT,
            kept_BT=shown_BT,
            weight_BT=torch.where(shown_BT, torch.ones_like(open_BT) if gain_BT is None else gain_BT, 0.0),
            asked_BT=asked_BT,
            loss_BT=torch.where(asked_BT, open_BT, 0.0) * (self.config.depth_weight / self.place.count),
        )
        return delta_BTD, {**records, **inner}

    def neutral(self) -> None:
        self.router.constant(-NEUTRAL_SCORE)

    def flops(self, tokens: float, routing: str) -> float:
        return self.router.flops(tokens)
