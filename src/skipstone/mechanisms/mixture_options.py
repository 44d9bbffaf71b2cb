"""The options of Mixture-of-Depths, and the weights that it may put on an update.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from skipstone.core.strict import choose
from skipstone.mechanisms.decisions import DECISIONS
from skipstone.mechanisms.routers import ROUTERS
from skipstone.mechanisms.schedules import Ramp, Shape, require_capacities

WEIGHTS: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "raw": lambda score_BT, scale: score_BT,
    "sigmoid": lambda score_BT, scale: score_BT.sigmoid(),
    "tanh": lambda score_BT, scale: 1 + scale * score_BT.tanh(),
    "none": lambda score_BT, scale: torch.ones_like(score_BT),
}


LARGEST_RANK = 1 << 16  # wider than any decoder: a slip


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepthsConfig:
    """capacity: share of a document's tokens that a block keeps, in (0, 1]: one number, a list with one for each routed
    block, or `{start, end, shape: linear | cosine}` over depth. decision: see `decisions`; threshold: p of
    `threshold_p`.

    weight: the factor on a kept token's update: none (1), raw (the paper's), sigmoid, tanh (1 + a tanh r, a = 0 at
    first).
    guidance: the router learns from the gradient at the block's output (see `guidance`), and sends none into the model.
    router: linear or mlp; router_norm: its input is divided by its root mean square. Unless they are set, both are on
    where the weight is none and the decision reads scores, off otherwise.
    kv: kept (a skipped token leaves no key and no value) or full (it does). skip: what a skipped token gets: identity,
    or low_rank with rank skip_rank.
    capacity_warmup: share of the training over which the capacity falls from 1, by warmup_shape.
    exploration: size of the Gumbel noise on the scores when training selects, falling to 0 at exploration_until (share
    of the training). auxiliary_weight: coefficient of guidance and of the decision's auxiliary loss; z_loss: of
    score^2.
    """

    capacity: float | list[float] | Ramp = 0.125
    decision: str = "ema_threshold"
    threshold: float = 0.5
    weight: str = "none"
    guidance: bool | None = None
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
        require_capacities("capacity", self.capacity)
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
            raise ValueError(f"exploration is noise on scores, at which decision {self.decision!r} does not look")
        for name in ("guidance", "router_norm"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, self.weight == "none" and decision.reads_scores)
        if self.guidance and not decision.reads_scores:
            raise ValueError(f"guidance trains scores, at which decision {self.decision!r} does not look")
