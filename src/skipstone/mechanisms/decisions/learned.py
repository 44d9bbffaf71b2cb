"""Decisions by a trained router: top-k of the row, fixed thresholds, a predictor.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.core.stream_gate import Line
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.decisions.base import Decision
from skipstone.mechanisms.routers import MLPRouter, hidden_width, scorer_of
from skipstone.mechanisms.schedules import Capacity


class TopK(Decision):
    """A decision that keeps the `capacity` share of each document's tokens with the highest scores.

    Mixture-of-Depths decides so in training (arXiv 2404.02258). It looks at the whole row, so it cannot generate. The
    constructor takes the arguments of `Decision`, of which only `capacity` (the share, or a `Capacity`) changes what is
    kept.
    """

    def require_causal(self) -> None:
        raise ValueError(
            "decision 'topk' ranks the whole row and cannot be made while generating; train with one of "
            f"{', '.join(Decision.causal_names)}, or pass routing='oracle' to evaluate with sight of the future"
        )


class FixedThreshold(ScoreThreshold):
    """Reads and sets the score above which decision "threshold" or "threshold_p" keeps a token.

    It starts at 0 for "threshold", and at the logit of the option `threshold` for "threshold_p". decision: the decision
    whose threshold this is. A changed threshold is not saved with the model.
    """

    saved = False

    def __init__(self, decision: Threshold | ThresholdP) -> None:
        self._decision = decision

    def get(self) -> float:
        return float(self._decision.line)

    def set(self, threshold: float) -> None:
        self._decision.line = threshold


class Threshold(Decision):
    """A decision that keeps each document's top `capacity` share in training, and tokens with score > 0 in generation.

    A loss makes both agree: the binary cross-entropy of the scores, as logits, against the training decision
    (Mixture-of-Depths, arXiv 2404.02258, section 3.5, first method). Its gradient reaches the router and, unless the
    router's input is detached, the model. The constructor takes the arguments of `Decision`, of which only `capacity`
    (the share, or a `Capacity`) changes what is kept.
    """

    is_causal = True
    has_loss = True
    trains_router = True
    line = 0.0

    def score_threshold(self) -> ScoreThreshold:
        return FixedThreshold(self)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return score_BT > self.line

    def stream_line(self) -> Line:
        return Line(float(self.line))

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        return F.binary_cross_entropy_with_logits(score_BT, kept_BT.to(score_BT.dtype), reduction="none")


class Predictor(Decision):
    """A decision that keeps each document's top `capacity` share in training, and in generation what an MLP predicts.

    The MLP predicts from the router's input whether training would keep the token. It learns from the training decision
    by binary cross-entropy; its input is detached, so that the model gets no gradient from it (Mixture-of-Depths, arXiv
    2404.02258, section 3.5, second method). width: size of the input. norm: whether the input is divided by its root
    mean square. options: further options of `Decision`.
    """

    is_causal = True
    has_loss = True

    def __init__(self, capacity: Capacity | float, width: int, norm: bool = False, **options: Any) -> None:
        super().__init__(capacity, width, **options)
        self.guess = MLPRouter(width, hidden_width(width), -1.0, norm)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.guess(x_BTD) > 0

    def stream_line(self) -> Line | None:
        scorer = scorer_of(self.guess)
        return None if scorer is None else Line(0.0, scorer=scorer)

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        guess_BT = self.guess(x_BTD.detach())
        return F.binary_cross_entropy_with_logits(guess_BT, kept_BT.to(guess_BT.dtype), reduction="none")

    def flops(self, tokens: float, routing: str) -> float:
        return self.guess.flops(tokens)

    def backward_flops(self, tokens: float) -> float:
        return self.guess.weight_flops(tokens)


class ThresholdP(Decision):
    """A decision that keeps tokens with sigmoid(score) > p, in training and generation alike.

    width: not used. threshold: p, in (0, 1). options: further options of `Decision`. After MoDification (arXiv
    2410.14268), which replaces top-k by a threshold. How many tokens are kept depends on the scores; a loss of ours,
    (load - capacity)^2, pulls the load, the share of a row's tokens that is kept, to the capacity. The load has the
    gradient of the row's mean of sigmoid(score). The coefficient of the loss, the mechanism's `auxiliary_weight`, must
    be large enough to outweigh the language-model loss.
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

    def stream_line(self) -> Line:
        return Line(float(self.line))

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        count_B1 = reached_BT.sum(1, keepdim=True).clamp(min=1)
        load_B1 = (kept_BT & reached_BT).sum(1, keepdim=True) / count_B1
        mean_B1 = torch.where(reached_BT, score_BT.sigmoid(), 0.0).sum(1, keepdim=True) / count_B1
        through_B1 = load_B1 + mean_B1 - mean_B1.detach()
        return (through_B1 - self.capacity.now).square().expand_as(score_BT)
