"""GateSkip (Laitenberger et al. 2025, arXiv 2510.13876): a gate on each sub-layer that also decides which tokens skip.

    g_i = sigmoid(W h_i + b)                   one number for each channel, or one for the token
    h  <- h + g * Attn(LN1(h))                 with `on: attention`
    h  <- h + g * FFN(LN2(h))                  with `on: mlp`, another gate
    loss = CE + sparsity_weight * mean over gates and tokens of mean(g)

Training is soft: everything is computed and scaled. A pass that decides as in generation skips tokens whose mean gate
is low, but still computes their keys and values. Difference from the paper, which ranks tokens by their gates within a
budget: the threshold is a running quantile of the gates in training, which can be applied to one token at a time. It
holds the budget as far as gates in a hard pass are distributed as in soft passes.

Shape letters: B rows, T tokens, D width, G gates of a token (D or 1).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipstone.core.counts import TokenCounts
from skipstone.core.records import DepthRecord, Record, Records, expect
from skipstone.core.seam import Update
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.base import DepthMechanism, Placement, real_mask
from skipstone.mechanisms.decisions import EmaThreshold
from skipstone.mechanisms.gating import apply_gate, is_hard
from skipstone.mechanisms.routers import LinearRouter
from skipstone.mechanisms.schedules import require_capacity

NEUTRAL_SCORE = 12.0  # a gate of 1 - 6e-6, with a gradient that does not vanish
EPSILON = 1e-6  # mean gates are clamped to this distance from 0 and 1, so that their logit is finite


@dataclass(frozen=True, kw_only=True)
class GateSkipConfig:
    """The options of GateSkip, which scales the updates of a sub-layer by sigmoid gates.

    capacity: share of tokens that execution "hard" computes, in (0, 1]. gate: whether a gate is one number per
    "channel" or one per "token". start_bias: initial bias of the gate's logit (5: gates start at .993).
    sparsity_weight: coefficient of the mean gate in the loss, at least 0. execution: what evaluation and generation do:
    "hard" skips tokens with low gates, "soft" only scales updates. Raises ValueError for values out of range.
    """

    capacity: float = 0.75
    gate: Literal["channel", "token"] = "channel"
    start_bias: float = 5.0
    sparsity_weight: float = 0.001
    execution: Literal["hard", "soft"] = "hard"

    def __post_init__(self) -> None:
        require_capacity("capacity", self.capacity)
        if not self.sparsity_weight >= 0:
            raise ValueError(f"sparsity_weight must not be negative, got {self.sparsity_weight}")


class GateSkip(DepthMechanism):
    """GateSkip (arXiv 2510.13876): a sigmoid gate scales a sub-layer's update, and tokens with low gates skip it.

    Training scales the updates of all tokens. Generation and evaluation skip tokens whose mean gate is below a running
    quantile of the gates seen in training, but still compute their keys and values; with `execution: soft`, they skip
    nothing. hidden_size: width of the model. placement: the block in which it is used; None outside of a model. Options
    are the fields of `GateSkipConfig`, as keyword arguments or as `config`.
    """

    Config = GateSkipConfig
    budget_by = "capacity"
    has_auxiliary_loss = True
    follows_scores = True

    def __init__(self, hidden_size: int, placement: Placement | None = None, **options: object) -> None:
        super().__init__(hidden_size, placement, **options)
        self._capacity: float = self.config.capacity
        outputs = hidden_size if self.config.gate == "channel" else 1
        self.router = LinearRouter(hidden_size, self.config.start_bias, outputs)
        self.decision = EmaThreshold(self.capacity, hidden_size)

    @property
    def capacity(self) -> float:
        return self._capacity

    def set_capacity(self, capacity: float) -> None:
        self._capacity = capacity

    @property
    def skips(self) -> bool:
        return self.capacity < 1 and self.config.execution == "hard"

    def score_threshold(self) -> ScoreThreshold | None:
        return self.decision.score_threshold() if self.skips else None

    def moving(self) -> dict[str, Tensor]:
        return {self.log_name(kind): value for kind, value in self.decision.moving().items()}

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the sub-layer's update times the gate, [B, T, D], and the decisions by mechanism name.

        update: computes the wrapped sub-layer's update, as update(x, tokens) -> (update, records). x_BTD: the hidden
        states that enter it. tokens: the tokens of this call. A recorded score is the logit of the mean of a token's
        gates. With `execution: hard`, tokens with low scores get no update in generation and evaluation.
        """
        open_BTG = self.router(x_BTD, every=True).sigmoid()
        mean_BT = open_BTG.mean(-1)
        score_BT, reached_BT = torch.logit(mean_BT.detach(), eps=EPSILON), real_mask(tokens, mean_BT)
        kept_BT = reached_BT & self._keeps(score_BT, x_BTD, tokens) if is_hard(self.config.execution, tokens) else None
        delta_BTD, inner = apply_gate(update, x_BTD, tokens, None, kept_BT, self.capacity)
        shown_BT = reached_BT if kept_BT is None else kept_BT
        records = self.record(
            score_BT=score_BT,
            kept_BT=shown_BT,
            weight_BT=torch.where(shown_BT, mean_BT, 0.0),
            reached_BT=reached_BT,
            loss_BT=torch.where(reached_BT, mean_BT, 0.0) * (self.config.sparsity_weight / self.placement.count),
        )
        return delta_BTD * open_BTG.to(delta_BTD.dtype), {**records, **inner}

    def _keeps(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        if tokens.forced_BT is not None:
            return tokens.forced_BT
        if self.capacity >= 1:
            return torch.ones_like(score_BT, dtype=torch.bool)
        return self.decision.causal(score_BT, x_BTD, tokens)

    def statistics(self, record: Record) -> Tensor | None:
        record = expect(record, DepthRecord)
        return self.decision.statistics(record.score_BT, record.reached_BT)

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        self.decision.advance(statistics)

    def not_ready_reason(self) -> str | None:
        return self.decision.not_ready_reason() if self.skips else None

    def set_identity(self) -> None:
        """Set all gates to 1 - 6e-6 and keep every token, so that the model computes nearly what a dense one does."""
        self.router.constant(NEUTRAL_SCORE)
        self.set_capacity(1.0)

    def end_dense_start(self) -> bool:
        """Restore the configured capacity after `set_identity`; return True, as something was undone."""
        self.set_capacity(self.config.capacity)
        return True

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        if kept is None and self.config.execution == "hard":
            kept = self.capacity * counts.kv_tokens
        return super().counts_inside(counts, kept, oracle)

    def flops(self, tokens: float, routing: str) -> float:
        return self.router.flops(tokens)
