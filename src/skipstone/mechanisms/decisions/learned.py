"""Decisions by a router that is trained for them: best of the row, fixed thresholds, a predictor.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.decisions.base import Decision
from skipstone.mechanisms.routers import MLPRouter, hidden_width
from skipstone.mechanisms.schedules import Capacity


class TopK(Decision):
    """The paper's training decision. Oracle only."""

    def require_causal(self) -> None:
        from skipstone.mechanisms.decisions import causal_decisions

        raise ValueError(
            "decision 'topk' ranks the whole row and cannot be made while generating; train with one of "
            f"{', '.join(causal_decisions())}, or pass routing='oracle' to evaluate with sight of the future"
        )


class FixedThreshold(ScoreThreshold):
    """A number that follows from the options when a model is loaded, so that no saved model keeps another."""

    saved = False

    def __init__(self, decision: Threshold | ThresholdP) -> None:
        self._decision = decision

    def get(self) -> float:
        return float(self._decision.line)

    def set(self, threshold: float) -> None:
        self._decision.line = threshold


class Threshold(Decision):
    """score > 0 after a binary cross-entropy that pulls the router's own scores towards the oracle's decision.

    arXiv 2404.02258, section 3.5, first method. It changes the language-model loss, because the router serves both.
    """

    is_causal = True
    has_loss = True
    trains_router = True
    line = 0.0

    def score_threshold(self) -> ScoreThreshold:
        return FixedThreshold(self)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return score_BT > self.line

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        return F.binary_cross_entropy_with_logits(score_BT, kept_BT.to(score_BT.dtype), reduction="none")


class Predictor(Decision):
    """A small MLP on the router's input, gradient stopped, guesses the oracle's decision; the model is not touched.

    arXiv 2404.02258, section 3.5, second method.
    """

    is_causal = True
    has_loss = True

    def __init__(self, capacity: Capacity | float, width: int, norm: bool = False, **options: Any) -> None:
        super().__init__(capacity, width, **options)
        self.guess = MLPRouter(width, hidden_width(width), -1.0, norm)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.guess(x_BTD) > 0

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        guess_BT = self.guess(x_BTD.detach())
        return F.binary_cross_entropy_with_logits(guess_BT, kept_BT.to(guess_BT.dtype), reduction="none")

    def flops(self, tokens: float, routing: str) -> float:
        return self.guess.flops(tokens)

    def backward_flops(self, tokens: float) -> float:
        return self.guess.weight_flops(tokens)


class ThresholdP(Decision):
    """sigmoid(score) > p, the same in training and inference: how many pass depends on the tokens alone.

    After MoDification (arXiv 2410.14268), which puts a threshold p in the place of top-k. The term that holds the
    capacity is ours: (load - capacity)^2, load the share of a row's tokens that passes, with the gradient of the mean
    of sigmoid(score). Its coefficient must suffice against the language-model loss, or the capacity is not held.
    """

    is_causal = True
    static = False
    has_loss = True
    trains_router = True

    def __init__(self, capacity: Capacity | float, width: int, threshold: float = 0.5, **options: Any) -> None:
        super().__init__(capacity, width, **options)
        self.line = math.log(threshold / (1 - threshold))  # the score whose sigmoid is p

    def score_threshold(self) -> ScoreThreshold:
        return FixedThreshold(self)

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.causal(score_BT, x_BTD, tokens)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return score_BT > self.line

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        count_B1 = reached_BT.sum(1, keepdim=True).clamp(min=1)
        load_B1 = (kept_BT & reached_BT).sum(1, keepdim=True) / count_B1
        mean_B1 = torch.where(reached_BT, score_BT.sigmoid(), 0.0).sum(1, keepdim=True) / count_B1
        through_B1 = load_B1 + mean_B1 - mean_B1.detach()
        return (through_B1 - self.capacity.now).square().expand_as(score_BT)
