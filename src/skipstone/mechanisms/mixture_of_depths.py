"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

    x_i <- x_i + w(r_i) * Delta_i(X_kept)   if token i is kept        r_i = w . x_i
    x_i <- x_i                              otherwise

Kept tokens attend to kept tokens only. Delta is what the block adds, so that capacity 1 with w = 1 is the dense model.
Where we differ: k = floor(capacity * length) of each document, padding excluded; `tanh` weights are p-MoD's
(arXiv 2412.04449); the causal decisions are named in `decisions`.

Shape letters: B rows, T tokens, K kept tokens, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.load import Load
from skipstone.core.records import DepthRecord, Record, Records, lift
from skipstone.core.seam import Update
from skipstone.core.strict import choose
from skipstone.core.tokens import Selection, Tokens
from skipstone.mechanisms.base import DepthMechanism, Place, every
from skipstone.mechanisms.decisions import DECISIONS, Forced, build_decision
from skipstone.mechanisms.routers import LinearRouter
from skipstone.ops import reference as ops

WEIGHTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "raw": lambda score_BT, scale: score_BT,
    "sigmoid": lambda score_BT, scale: score_BT.sigmoid(),
    "tanh": lambda score_BT, scale: 1 + scale * score_BT.tanh(),
    "none": lambda score_BT, scale: torch.ones_like(score_BT),
}


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsConfig:
    """capacity: share of a document's tokens that a block keeps, in (0, 1]. decision: see `decisions`.

    weight: the factor on a kept token's update: raw (the paper's), sigmoid, tanh (1 + a tanh r, a starts at 0), none
    (the router then learns from the auxiliary loss of `threshold` only).
    auxiliary_weight: coefficient of the decision's auxiliary loss.
    """

    capacity: float = 0.125
    decision: str = "predictor"
    weight: str = "raw"
    auxiliary_weight: float = 0.01

    def __post_init__(self) -> None:
        if not 0 < self.capacity <= 1:
            raise ValueError(f"capacity must be in (0, 1], got {self.capacity}")
        if self.auxiliary_weight < 0:
            raise ValueError(f"auxiliary_weight must not be negative, got {self.auxiliary_weight}")
        choose("decision", self.decision, DECISIONS)
        choose("weight", self.weight, WEIGHTS)


class MixtureOfDepths(DepthMechanism):
    """A router keeps the top tokens of a block; the rest skip it."""

    Config = MixtureOfDepthsConfig

    def __init__(self, hidden_size: int, place: Place | None = None, **options: Any) -> None:
        super().__init__(hidden_size, place, **options)
        self.capacity, self.weighting = self.config.capacity, self.config.weight
        self.router = LinearRouter(hidden_size)
        self.decision = build_decision(self.config.decision, self.capacity, hidden_size, seed=self.place.layer)
        self.tanh_scale = nn.Parameter(torch.zeros(())) if self.weighting == "tanh" else None

    def reset_parameters(self) -> None:
        if self.tanh_scale is not None:
            init.zeros_(self.tanh_scale)

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Update of the kept tokens, 0 for the others."""
        score_BT = self.router(x_BTD)
        asked_BT = every(tokens, score_BT)
        kept_BT = self.decide(score_BT, x_BTD, tokens) & asked_BT
        weight_BT = torch.where(kept_BT, WEIGHTS[self.weighting](score_BT, self.tanh_scale), 0.0)
        records = self.record(
            score_BT=score_BT,
            kept_BT=kept_BT,
            weight_BT=weight_BT,
            asked_BT=asked_BT,
            loss_BT=self._loss(score_BT, kept_BT, asked_BT, x_BTD, tokens),
        )
        part = self._narrow(kept_BT, tokens)
        if part.width == 0:
            return x_BTD * 0 + (weight_BT * 0)[..., None].to(x_BTD.dtype), records
        delta_BKD, inner = update(part.gather(x_BTD), tokens.select(part))
        delta_BKD = delta_BKD * part.gather(weight_BT)[..., None].to(delta_BKD.dtype)
        return part.scatter(delta_BKD), {**records, **lift(inner, part, tokens.state)}

    def decide(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """bool [B, T]; padding may be among the kept."""
        if tokens.forced_BT is not None:
            return tokens.forced_BT.expand_as(score_BT)
        if self.capacity >= 1:
            return torch.ones_like(score_BT, dtype=torch.bool)
        decide = self.decision.oracle if tokens.mode.routing == "oracle" else self.decision.causal
        return decide(score_BT, x_BTD, tokens)

    def _loss(
        self, score_BT: Tensor, kept_BT: Tensor, asked_BT: Tensor, x_BTD: Tensor, tokens: Tokens
    ) -> Tensor | None:
        """Only an oracle's decision is a target: a causal one would teach the predictor its own guess."""
        if tokens.mode.routing != "oracle" or tokens.forced_BT is not None:
            return None
        loss_BT = self.decision.loss(score_BT, kept_BT, x_BTD)
        return None if loss_BT is None else torch.where(asked_BT, loss_BT, 0.0) * self.config.auxiliary_weight

    def _narrow(self, kept_BT: Tensor, tokens: Tokens) -> Selection:
        static = tokens.forced_BT is None and (
            self.capacity >= 1 or (tokens.mode.routing == "oracle" and self.decision.static)
        )
        if not static or isinstance(self.decision, Forced):
            return tokens.narrow(kept_BT)
        whole = tokens.group_BT is None
        return tokens.narrow(kept_BT, width=ops.quota(self.capacity, tokens.length), exact=whole)

    def statistics(self, record: Record) -> Tensor | None:
        assert isinstance(record, DepthRecord)
        return self.decision.statistics(record.score_BT.detach(), record.asked_BT)

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        self.decision.advance(statistics)

    def unready(self) -> str | None:
        return self.decision.unready() if self.capacity < 1 else None

    def require_causal(self) -> None:
        if self.capacity < 1:
            self.decision.require_causal()

    def neutral(self) -> None:
        """Capacity 1 and weight 1: raw scores cannot be 1 everywhere by any choice of parameters."""
        self.capacity = self.decision.capacity = 1.0
        if self.tanh_scale is None:
            self.weighting = "none"
        else:
            with torch.no_grad():
                self.tanh_scale.zero_()

    def narrow(self, load: Load, kept: Load | float | None = None, oracle: bool = False) -> Load:
        """Tokens that are not kept vanish. The quota of a static decision is executed whatever the scores."""
        if oracle and self.decision.static:
            kept = ops.quota(self.capacity, int(load.given))
        return load.of(self.capacity * load.given if kept is None else kept)

    def flops(self, tokens: float, routing: str) -> float:
        decides = routing == "oracle" or (routing == "causal" and self.capacity < 1)
        return self.router.flops(tokens) + (self.decision.flops(tokens, routing) if decides else 0)

    def backward_flops(self, tokens: float) -> float:
        learns = self.weighting != "none" or self.decision.trains_router
        return (2 * self.router.flops(tokens) if learns else 0) + self.decision.backward_flops(tokens)
