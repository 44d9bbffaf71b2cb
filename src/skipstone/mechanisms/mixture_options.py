"""The options of Mixture-of-Depths, and the functions of the score that scale the updates of kept tokens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from skipstone.core.strict import choose
from skipstone.mechanisms.decisions import DECISIONS, Boundaries
from skipstone.mechanisms.decisions.boundary import EXPECTED_SHARE
from skipstone.mechanisms.routers import ROUTERS
from skipstone.mechanisms.schedules import Ramp, Shape, require_capacities

WEIGHTS: dict[str, Callable[[Tensor, Any], Tensor]] = {  # functions of the score and the scale of `tanh`
    "raw": lambda score_BT, scale: score_BT,
    "sigmoid": lambda score_BT, scale: score_BT.sigmoid(),
    "tanh": lambda score_BT, scale: 1 + scale * score_BT.tanh(),
    "none": lambda score_BT, scale: torch.ones_like(score_BT),
}


DEFAULT_CAPACITY = 0.125
LARGEST_RANK = 1 << 16  # wider than any decoder, so a larger rank is a mistake


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsConfig:
    """The options of Mixture-of-Depths, where a block computes only a share of the tokens.

    Which tokens: capacity: share of a document's tokens that a block keeps, in (0, 1]: one number, a list with one for
    each routed block, or a `Ramp` {start, end, shape} over depth. None means .125, or .2 with decision "boundary"; that
    one keeps as many tokens as the text has boundaries, and only cost estimates use its capacity. decision: the rule
    that keeps tokens: "ema_threshold" (scores above a running quantile), "topk" (each document's best, which cannot
    generate), "threshold" (topk in training, scores above 0 in generation), "predictor" (topk in training, what
    an MLP predicts in generation), "threshold_p" (sigmoid(score) above `threshold`), "boundary" (word boundaries),
    "forced" (masks that the caller gives), "random" or "positional" (controls). threshold: a probability in (0, 1), for
    "threshold_p". boundary: options of decision "boundary"; None means `Boundaries()`. capacity_warmup: fraction of
    the training over which the capacity falls from 1; warmup_shape: shape of the fall, "linear" or "cosine".

    The update: weight: factor on a kept token's update: "none" (1), "raw" (the score, as in the paper), "sigmoid" (of
    the score), or "tanh" (1 + a tanh(score), a learned from 0). kv: whether skipped tokens provide keys and values,
    "full" (yes) or "kept" (no). skip: update of a skipped token, "identity" (none) or "low_rank" (a learned linear map
    of rank skip_rank).

    The router: router: "linear" or "mlp". router_norm: whether its input is divided by its root mean square; None means
    yes if the weight is "none" and the decision reads scores. guidance: whether it learns from the gradient norms at
    the block's output (`guided`); None means yes if the weight is "none", the decision reads scores, and benefit is
    False. benefit: whether it learns from the measured benefit of the block (`benefit_loss`). Neither sends its
    gradient into the model. exploration: scale of the Gumbel noise on scores in training, which falls to 0 over the
    fraction exploration_until of the training. auxiliary_weight: coefficient of the decision's auxiliary loss, of
    guidance and of benefit. z_loss: coefficient of score^2. Raises ValueError for values out of range and options that
    exclude each other.
    """

    capacity: float | list[float] | Ramp | None = None
    decision: str = "ema_threshold"
    threshold: float = 0.5
    boundary: Boundaries | None = None
    weight: str = "none"
    guidance: bool | None = None
    benefit: bool = False
    router: str = "linear"
    router_norm: bool | None = None
    kv: Literal["kept", "full"] = "kept"
    skip: Literal["identity", "low_rank"] = "identity"
    skip_rank: int = 8
    capacity_warmup: float = 0.0
    warmup_shape: Shape = "linear"
    exploration: float = 0.0
    exploration_until: float = 0.5
    auxiliary_weight: float = 0.01
    z_loss: float = 0.0

    def __post_init__(self) -> None:
        if self.capacity is None:
            object.__setattr__(self, "capacity", EXPECTED_SHARE if self.decision == "boundary" else DEFAULT_CAPACITY)
        require_capacities("capacity", self.shares)
        for name in ("auxiliary_weight", "z_loss", "exploration"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not 0 <= self.capacity_warmup <= 1:
            raise ValueError(f"capacity_warmup must be in [0, 1], got {self.capacity_warmup}")
        if not 0 < self.exploration_until <= 1:
            raise ValueError(f"exploration_until must be in (0, 1], got {self.exploration_until}")
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")
        if not 1 <= self.skip_rank <= LARGEST_RANK:
            raise ValueError(f"skip_rank must be in [1, {LARGEST_RANK:,}], got {self.skip_rank:,}")
        decision = choose("decision", self.decision, DECISIONS)
        choose("weight", self.weight, WEIGHTS)
        choose("router", self.router, ROUTERS)
        if self.exploration and not decision.reads_scores:
            raise ValueError(f"exploration adds noise to scores, which decision {self.decision!r} does not read")
        unweighted = self.weight == "none" and decision.reads_scores
        if self.guidance is None:
            object.__setattr__(self, "guidance", unweighted and not self.benefit)
        if self.router_norm is None:
            object.__setattr__(self, "router_norm", unweighted)
        if self.benefit and (self.guidance or not decision.reads_scores):
            other = "guidance" if self.guidance else f"decision {self.decision!r}, which does not read scores"
            raise ValueError(f"benefit trains scores and cannot be combined with {other}")
        if self.guidance and not decision.reads_scores:
            raise ValueError(f"guidance trains scores, which decision {self.decision!r} does not read")
        if self.boundary is not None and not decision.reads_ids:
            raise ValueError(f"boundary names token ids, which decision {self.decision!r} does not read")

    @property
    def shares(self) -> float | list[float] | Ramp:
        """The option `capacity`: the share of tokens that blocks keep, one number, a list of them or a ramp over depth.

        It is never None once the options are parsed.
        """
        assert self.capacity is not None
        return self.capacity
