"""`Decision`: the base class of decisions.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from skipstone.core.stream_gate import Line
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.schedules import Capacity
from skipstone.ops import reference as ops


class Decision(nn.Module):
    """A rule that turns scores into kept tokens. By default the oracle keeps each document's top `capacity` share.

    is_causal: generation can make it. static: an oracle decision keeps a number of tokens known in advance, and so
    gathers without a host sync. has_loss: it has an auxiliary loss. trains_router: that loss sends gradients into the
    router. reads_scores: it depends on the scores, so that noise on them changes which tokens are kept. reads_ids: it
    depends on token ids (`Tokens.state`). imposed: the caller decides.
    """

    is_causal = False
    static = True
    trains_router = False
    reads_scores = True
    reads_ids = False
    has_loss = False
    imposed = False
    causal_names: ClassVar[list[str]] = []  # of all decisions that generation can make; the table fills it

    def __init__(
        self,
        capacity: Capacity | float,
        width: int,
        seed: int = 0,
        threshold: float = 0.5,
        norm: bool = False,
        noise_key: int = 0,
    ) -> None:
        """Set the capacity, a share in (0, 1]; subclasses use the other options that they need.

        width: D. seed: for random controls. threshold: probability, for a fixed threshold. norm: whether the router's
        input is normalised. noise_key: of random draws.
        """
        super().__init__()
        self.noise_key = noise_key
        self.capacity = capacity if isinstance(capacity, Capacity) else Capacity(capacity)

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return the kept tokens, bool [B, T]; may depend on the whole row."""
        return ops.select_top(score_BT.detach(), self.capacity.now, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return the kept tokens, bool [B, T], none depending on later tokens. Only if `is_causal`."""
        raise NotImplementedError

    def require_causal(self) -> None:
        """Raise ValueError if the decision has no causal form."""

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        """Return the auxiliary loss of each token against the oracle's decision, fp32 [B, T], or None."""
        return None

    def statistics(self, score_BT: Tensor, reached_BT: Tensor) -> Tensor | None:
        """Return the statistics of one micro-batch for `advance`, an fp32 vector; None if it needs none."""
        return None

    def advance(self, statistics: Tensor | None) -> None:
        """Update the decision's state after an optimizer step from averaged `statistics`."""

    def not_ready_reason(self) -> str | None:
        """Return why causal decisions are not reliable yet; None if they are."""
        return None

    def score_threshold(self) -> ScoreThreshold | None:
        """Return the threshold that a causal pass compares scores with; None without one."""
        return None

    def stream_line(self) -> Line | None:
        """Return how a causal pass compares scores, for compiled steps; None for a decision by anything else."""
        return None

    def moving(self) -> dict[str, Tensor]:
        """Return the scalars that `advance` changes, by kind."""
        return {}

    def flops(self, tokens: float, routing: str) -> float:
        """Return the matrix FLOPs of the decision itself, without the router's."""
        return 0

    def backward_flops(self, tokens: float) -> float:
        """Return the matrix FLOPs of the decision itself in the backward pass."""
        return 0
