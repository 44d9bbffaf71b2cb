"""A decision by a threshold that follows the scores of training: a running average of their (1 - capacity) quantile.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import initialization as init

from skipstone.core.stream_gate import Line
from skipstone.core.threshold import ScoreThreshold, State
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.decisions.base import Decision
from skipstone.mechanisms.schedules import Capacity


class EmaThreshold(Decision):
    """A decision that keeps tokens whose score exceeds a running average of the (1 - capacity) quantile of scores.

    Training and generation decide alike. After Expert Threshold routing (arXiv 2603.11535), proposed there for experts.
    width: not used. options: further options of `Decision`. threshold: the running average, fp32 []: a plain mean over
    the first 10 steps, then an exponential one with momentum .9. steps: int64 [], how many optimizer steps have entered
    it. Both change only in `advance`, which a trainer calls after each optimizer step. During a warm-up of the capacity
    the average restarts at each step, because quantiles at other capacities are far from the threshold needed.
    """

    is_causal = True
    static = False
    momentum = 0.9  # a batch's quantile is accurate to under 1 % of its tokens, while scores drift by more
    threshold: Tensor
    steps: Tensor

    def __init__(self, capacity: Capacity | float, width: int, **options: Any) -> None:
        super().__init__(capacity, width, **options)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        """Set threshold and steps to 0; transformers calls this after loading a checkpoint that lacks them."""
        init.zeros_(self.threshold)
        init.zeros_(self.steps)

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.causal(score_BT, x_BTD, tokens)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return score_BT > self.threshold

    def stream_line(self) -> Line:
        return Line(threshold=self.threshold)

    def statistics(self, score_BT: Tensor, reached_BT: Tensor) -> Tensor | None:
        """Return the (1 - capacity) quantile of a micro-batch's scores, fp32 [1]; NaN if no token was reached.

        score_BT: router scores. reached_BT: bool, tokens that are neither padding nor skipped by an outer mechanism.
        """
        return torch.where(reached_BT, score_BT, torch.nan).nanquantile(1 - self.capacity.now)[None]

    def advance(self, statistics: Tensor | None) -> None:
        if statistics is not None:
            seen = statistics[0].isfinite()
            if self.capacity.moves:
                self.steps.zero_()
            self.steps += seen
            momentum = torch.clamp(1 - 1 / self.steps.clamp(min=1), max=self.momentum)  # at first a plain mean
            self.threshold.lerp_(torch.where(seen, statistics[0].to(self.threshold), self.threshold), 1 - momentum)

    def score_threshold(self) -> ScoreThreshold:
        return RunningThreshold(self)

    def moving(self) -> dict[str, Tensor]:
        return {"threshold": self.threshold}

    def not_ready_reason(self) -> str | None:
        if self.steps.item():
            return None
        return (
            "ema_threshold was never advanced: train with skipstone.train.RoutingTrainer or its RoutingMixin, "
            "or use another decision"
        )


class RunningThreshold(ScoreThreshold):
    """Reads and sets the threshold of an `EmaThreshold` decision, the score above which a token is kept.

    decision: the decision. Its threshold is a buffer that is saved with the model. Once set, it counts as trained, so
    that generation no longer warns (`Decision.not_ready_reason`).
    """

    def __init__(self, decision: EmaThreshold) -> None:
        self._decision = decision

    def get(self) -> float:
        return float(self._decision.threshold)

    def set(self, threshold: float) -> None:
        self._decision.threshold.fill_(threshold)
        self._decision.steps.clamp_(min=1)  # a calibrated threshold is as ready as a trained one

    def state(self) -> State:
        return [self.get(), float(self._decision.steps)]

    def restore(self, state: State) -> None:
        for buffer, value in zip((self._decision.threshold, self._decision.steps), state, strict=True):
            buffer.fill_(value)  # type: ignore[arg-type]
