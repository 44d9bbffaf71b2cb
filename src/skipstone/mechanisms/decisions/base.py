"""What every decision declares.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from torch import Tensor, nn

from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.schedules import Capacity
from skipstone.ops import reference as ops


class Decision(nn.Module):
    """From scores to who is kept. The oracle is the paper's: the best `capacity` of each document of each row.

    is_causal: generation can make it. static: an oracle decision keeps a number of tokens that is known beforehand, and
    so gathers without a host sync. has_loss: it has an auxiliary loss. trains_router: that loss sends gradients into
    the router. reads_scores: it depends on the scores, so that noise on them changes which tokens are kept. imposed:
    the caller decides.
    """

    is_causal = False
    static = True
    trains_router = False
    reads_scores = True
    has_loss = False
    imposed = False

    def __init__(
        self,
        capacity: Capacity | float,
        width: int,
        seed: int = 0,
        threshold: float = 0.5,
        norm: bool = False,
        noise_key: int = 0,
    ) -> None:
        """width: D. seed: for controls that draw. threshold: the probability of decisions with a fixed one. norm: the
        router's input is normalised. noise_key: of random numbers. Each decision names those that it reads."""
        super().__init__()
        self.noise_key = noise_key
        self.capacity = capacity if isinstance(capacity, Capacity) else Capacity(capacity)

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """bool [B, T], may look at the whole row."""
        return ops.select_top(score_BT.detach(), self.capacity.now, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """bool [B, T]; a token's entry depends on no later token. Only where `is_causal`."""
        raise NotImplementedError

    def require_causal(self) -> None:
        """Raise ValueError if the decision has no causal form."""

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        """fp32 auxiliary loss of each token [B, T] against the oracle's decision, or None."""
        return None

    def statistics(self, score_BT: Tensor, reached_BT: Tensor) -> Tensor | None:
        return None

    def advance(self, statistics: Tensor | None) -> None:
        pass

    def not_ready_reason(self) -> str | None:
        return None

    def score_threshold(self) -> ScoreThreshold | None:
        """Return the threshold that scores are compared with in a causal pass, or None."""
        return None

    def moving(self) -> dict[str, Tensor]:
        """Return the scalars that `advance` moves, by their kinds."""
        return {}

    def flops(self, tokens: float, routing: str) -> float:
        """Matrix FLOPs of the decision itself, the router's not among them."""
        return 0

    def backward_flops(self, tokens: float) -> float:
        return 0
