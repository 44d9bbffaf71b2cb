"""`Decision`: the base class of the rules that turn router scores into the set of tokens to keep.

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
    """A rule that turns router scores into kept tokens; the base class keeps each document's top `capacity` share.

    The constructor takes what every decision may need: the capacity (a share of tokens, or a `Capacity`, which changes
    during training), the width of the hidden states, seed (of fixed pseudo-random patterns), threshold (a probability),
    norm (whether a network of the decision normalises its input) and noise_key (separates its random draws from
    others). is_causal: whether it can be made without later tokens, as generation requires. static: whether the number
    of kept tokens is known in training before the scores are, so that the CPU need not wait for the GPU to gather them.
    has_loss: whether it adds an auxiliary loss. trains_router: whether this loss sends gradients into the router.
    reads_scores: whether kept tokens depend on the scores. reads_ids: whether they depend on token ids, found in
    `Tokens.state`. imposed: whether the caller decides. causal_names: names of all decisions with is_causal.
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
        """Store the capacity, the share of tokens to keep, in (0, 1], or its schedule.

        Subclasses use the other options that they need. width: size of a hidden state. seed: the seed of fixed
        pseudo-random patterns. threshold: a probability, for a fixed threshold. norm: whether a network of the decision
        normalises its input. noise_key: separates this module's random draws from others.
        """
        super().__init__()
        self.noise_key = noise_key
        self.capacity = capacity if isinstance(capacity, Capacity) else Capacity(capacity)

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return the tokens to keep in training, bool [B, T], a choice that may depend on the whole row.

        score_BT: router scores, fp32. x_BTD: the hidden states that the router read. tokens: documents, padding and
        positions; by default each document keeps the `capacity` share with the highest scores.
        """
        return ops.select_top(score_BT.detach(), self.capacity.now, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return the tokens to keep, bool [B, T], a choice that does not depend on later tokens.

        Decisions whose `is_causal` is False raise NotImplementedError. score_BT: router scores, fp32. x_BTD: the hidden
        states that the router read. tokens: documents, padding and positions.
        """
        raise NotImplementedError

    def require_causal(self) -> None:
        """Raise ValueError if the decision cannot be made without later tokens."""

    def loss(self, score_BT: Tensor, kept_BT: Tensor, x_BTD: Tensor, reached_BT: Tensor) -> Tensor | None:
        """Return the auxiliary loss of each token, fp32 [B, T], or None if there is none (the default).

        score_BT: router scores. kept_BT: bool, the tokens kept by the training decision (without exploration noise),
        which the loss may use as its target. x_BTD: the hidden states that the router read. reached_BT: bool, tokens
        that are neither padding nor skipped by an outer mechanism.
        """
        return None

    def statistics(self, score_BT: Tensor, reached_BT: Tensor) -> Tensor | None:
        """Return the figures of a micro-batch's scores that `advance` needs, as an fp32 vector; None if it needs none.

        score_BT: router scores. reached_BT: bool, tokens that are neither padding nor skipped by an outer mechanism.
        """
        return None

    def advance(self, statistics: Tensor | None) -> None:
        """Update the decision's state after an optimizer step.

        statistics: the mean of `Decision.statistics` over micro-batches and processes; None means that the decision has
        none.
        """

    def not_ready_reason(self) -> str | None:
        """Return why generation cannot rely on the decision yet, such as an untrained threshold; None if it can."""
        return None

    def score_threshold(self) -> ScoreThreshold | None:
        """Return an object that reads and sets the score above which generation keeps a token; None without one."""
        return None

    def stream_line(self) -> Line | None:
        """Return the score that a token must exceed to be kept in generation, as data for compiled code.

        The `Line` holds this threshold and, if the score is not that of the mechanism's router, the network that
        computes it. A step that runs all blocks in one numba call decides by it. None for decisions that are made in
        another way; the mechanism is then called as usual.
        """
        return None

    def moving(self) -> dict[str, Tensor]:
        """Return the scalar tensors that `advance` changes, by name, such as {"threshold": fp32 []}, for logs."""
        return {}

    def flops(self, tokens: float, routing: str) -> float:
        """Return the matrix FLOPs of the decision's own network in a forward pass over `tokens` tokens, or 0.

        routing: "oracle" (training) or "causal" (without looking at later tokens).
        """
        return 0

    def backward_flops(self, tokens: float) -> float:
        """Return the matrix FLOPs of the decision's own network in a backward pass over `tokens` tokens, or 0."""
        return 0
