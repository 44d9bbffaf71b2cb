"""Decisions: from scores to who is kept. One class each, and a table.

An oracle decision sees the whole row (training); a causal one is what generation can do.
Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.strict import choose
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.routers import MLPRouter
from skipstone.ops import reference as ops


class Decision(nn.Module):
    """The paper's training decision: the best `capacity` of each document of each row. No causal form.

    static: an oracle decision keeps a number of tokens that is known beforehand, and so gathers without a host sync.
    trains_router: its auxiliary loss sends gradients into the router.
    """

    is_causal = False
    static = True
    trains_router = False

    def __init__(self, capacity: float, width: int, seed: int) -> None:
        super().__init__()
        self.capacity, self.seed = capacity, seed

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """bool [B, T], may look at the whole row."""
        return ops.select_top(score_BT.detach(), self.capacity, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """bool [B, T]; a token's entry depends on no later token. Raises ValueError where there is no such form."""
        self.require_causal()
        raise NotImplementedError

    def require_causal(self) -> None:
        """Raise ValueError if the decision has no causal form."""
        if not self.is_causal:
            raise ValueError(
                "decision 'topk' ranks the whole row and cannot be made while generating; train with one of "
                f"{', '.join(causal_decisions())}, or pass routing='oracle' to evaluate with sight of the future"
            )

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor) -> Tensor | None:
        """fp32 auxiliary loss of each token [B, T] against the oracle's decision, or None."""
        return None

    def statistics(self, score_BT: Tensor, asked_BT: Tensor) -> Tensor | None:
        return None

    def advance(self, statistics: Tensor | None) -> None:
        pass

    def unready(self) -> str | None:
        return None

    def flops(self, tokens: float, routing: str) -> float:
        """Matrix FLOPs of the decision itself, the router's not among them."""
        return 0

    def backward_flops(self, tokens: float) -> float:
        return 0


class TopK(Decision):
    """Oracle only."""


class Threshold(Decision):
    """score > 0 after a binary cross-entropy that pulls the router's own scores towards the oracle's decision.

    arXiv 2404.02258, section 3.5, first method. It changes the language-model loss, because the router serves both.
    """

    is_causal = True
    trains_router = True

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return score_BT > 0

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor) -> Tensor | None:
        return F.binary_cross_entropy_with_logits(score_BT, kept_BT.float(), reduction="none")


class Predictor(Decision):
    """A small MLP on the router's input, gradient stopped, guesses the oracle's decision; the model is not touched.

    arXiv 2404.02258, section 3.5, second method.
    """

    is_causal = True

    def __init__(self, capacity: float, width: int, seed: int) -> None:
        super().__init__(capacity, width, seed)
        self.guess = MLPRouter(width, max(width // 4, 16), start_bias=-1.0)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.guess(x_BTD) > 0

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor) -> Tensor | None:
        guess_BT = self.guess(x_BTD.detach())
        return F.binary_cross_entropy_with_logits(guess_BT, kept_BT.float(), reduction="none")

    def flops(self, tokens: float, routing: str) -> float:
        return self.guess.flops(tokens)

    def backward_flops(self, tokens: float) -> float:
        return 2 * self.guess.flops(tokens) - 2 * tokens * self.guess.hidden_weight.numel()  # none for the input


class EmaThreshold(Decision):
    """score > a running average of the (1 - capacity) quantile of the scores, the same in training and inference.

    After Expert Threshold routing (arXiv 2603.11535), there for experts. The threshold moves once an optimizer step,
    outside forward; without a trainer that advances it, it stays where it is.
    """

    is_causal = True
    static = False
    momentum = 0.9  # a batch's quantile is exact to under a per cent of its tokens, while scores drift by more
    threshold: Tensor
    steps: Tensor

    def __init__(self, capacity: float, width: int, seed: int) -> None:
        super().__init__(capacity, width, seed)
        self.register_buffer("threshold", torch.zeros(()))
        self.register_buffer("steps", torch.zeros((), dtype=torch.long))

    def reset_parameters(self) -> None:
        """For checkpoints without these buffers, which transformers allocates without a value."""
        init.zeros_(self.threshold)
        init.zeros_(self.steps)

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.causal(score_BT, x_BTD, tokens)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return score_BT > self.threshold

    def statistics(self, score_BT: Tensor, asked_BT: Tensor) -> Tensor | None:
        """[1], the quantile that capacity asks for; NaN where nobody was asked."""
        return torch.where(asked_BT, score_BT, torch.nan).nanquantile(1 - self.capacity)[None]

    def advance(self, statistics: Tensor | None) -> None:
        if statistics is not None:
            seen = statistics[0].isfinite()
            self.steps += seen
            momentum = torch.clamp(1 - 1 / self.steps.clamp(min=1), max=self.momentum)  # the first ones count in full
            self.threshold.lerp_(torch.where(seen, statistics[0].to(self.threshold), self.threshold), 1 - momentum)

    def unready(self) -> str | None:
        if self.steps.item():
            return None
        return (
            "ema_threshold was never advanced: train with skipstone.train.RoutingTrainer or its RoutingMixin, "
            "or use another decision"
        )


class Random(Decision):
    """Control: tokens drawn at random; without noise a fixed pseudo-random pattern of positions."""

    is_causal = True

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        if tokens.mode.noise:
            return ops.select_top(torch.rand_like(score_BT), self.capacity, tokens.group_BT)
        hashed_BT = self._hash(tokens.position_BT).expand_as(score_BT)
        return ops.select_top(hashed_BT, self.capacity, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self._hash(tokens.position_BT).expand_as(score_BT) < self.capacity

    def _hash(self, position_BT: Tensor) -> Tensor:
        """A number in [0, 1) from position and seed: the fractional part of a large sine, enough for a control."""
        turned = torch.sin(position_BT.double() * 12.9898 + self.seed * 78.233) * 43758.5453
        return (turned - turned.floor()).float()


class Positional(Decision):
    """Control: every 1/capacity-th position of a document."""

    is_causal = True

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """The same pattern, filled up or cut to the quota where positions have gaps (inside another mechanism)."""
        return ops.select_top(self.causal(score_BT, x_BTD, tokens).float(), self.capacity, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        position_BT = tokens.position_BT.double()
        before_BT, after_BT = (x * self.capacity * ops.ROUNDING for x in (position_BT, position_BT + 1))
        return (after_BT.floor() > before_BT.floor()).expand_as(score_BT)


class Forced(Decision):
    """Only what the caller imposes: forward(routing={layer: mask})."""

    is_causal = True

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.causal(score_BT, x_BTD, tokens)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        raise ValueError("decision 'forced' needs forward(routing={layer: bool mask [B, T]}) for every routed layer")


DECISIONS: dict[str, type[Decision]] = {
    "topk": TopK,
    "threshold": Threshold,
    "predictor": Predictor,
    "ema_threshold": EmaThreshold,
    "random": Random,
    "positional": Positional,
    "forced": Forced,
}


def causal_decisions() -> list[str]:
    """Names of the decisions that generation can make."""
    return [name for name, kind in DECISIONS.items() if kind.is_causal and kind is not Forced]


def build_decision(name: str, capacity: float, width: int, seed: int) -> Decision:
    return choose("decision", name, DECISIONS)(capacity, width, seed)
