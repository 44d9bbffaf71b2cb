"""The options of Token-Selective Attention, and which of them go together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from skipstone.core.strict import choose
from skipstone.mechanisms.decisions import DECISIONS
from skipstone.mechanisms.schedules import Ramp, require_capacities

SHARES = {name: DECISIONS[name] for name in ("ema_threshold", "random", "positional")}  # the same in both passes


@dataclass(frozen=True, kw_only=True)
class TokenSelectiveConfig:
    """start_bias: b2 before training (-1: p is .27). router_width: hidden width, default max(d / 4, 16). router_norm:
    the router's input is divided by its root mean square; unless set, on with guidance. gate: one for each token, or
    one constant for the block. learn: false leaves the gate as it starts. depth_weight: lambda of the depth loss.

    execution: what a causal pass does, hard (skip) or soft (scale only). training: what an oracle pass does, soft, hard
    (skip as a causal pass does) or straight_through (the numbers of hard, but all is computed, so that every gate has a
    gradient). threshold: p at and above which a hard pass skips. hard_gain: gain of a kept token, gate (1 - p) or one.

    capacity: in place of the threshold, the share of tokens that each gated block keeps, in (0, 1]: one number, a list
    with one for each gated block, or `{start, end, shape: linear | cosine}` over depth. capacity_warmup: share of the
    training over which it falls from 1. decision: who is kept, ema_threshold (a running quantile of the scores), or the
    controls random and positional. guidance: the router learns from the gradient at the block's output (see
    `guidance`), with coefficient auxiliary_weight; its input sends none into the model.
    kv: full (skipped tokens give keys and values) or kept (they do not).
    """

    start_bias: float = -1.0
    router_width: int | None = None
    router_norm: bool | None = None
    gate: Literal["token", "constant"] = "token"
    learn: bool = True
    depth_weight: float = 0.001
    execution: Literal["hard", "soft"] = "hard"
    training: Literal["soft", "hard", "straight_through"] = "soft"
    threshold: float = 0.5
    hard_gain: Literal["gate", "one"] = "gate"
    capacity: float | list[float] | Ramp | None = None
    capacity_warmup: float = 0.0
    decision: str = "ema_threshold"
    guidance: bool = False
    auxiliary_weight: float = 0.01
    kv: Literal["full", "kept"] = "full"

    def __post_init__(self) -> None:
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be in (0, 1), got {self.threshold}")
        for name in ("depth_weight", "auxiliary_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.router_width is not None and self.router_width < 1:
            raise ValueError(f"router_width must be at least 1, got {self.router_width}")
        if not 0 <= self.capacity_warmup <= 1:
            raise ValueError(f"capacity_warmup must be in [0, 1], got {self.capacity_warmup}")
        choose("decision", self.decision, SHARES)
        self._check_capacity()
        self._check_passes()
        if self.router_norm is None:
            object.__setattr__(self, "router_norm", self.guidance)

    def _check_capacity(self) -> None:
        if self.capacity is not None:
            require_capacities("capacity", self.capacity)
            self._check_ranks()
            return
        needs = {"capacity_warmup": 0.0, "decision": "ema_threshold", "guidance": False}
        for name, without in needs.items():
            if getattr(self, name) != without:
                raise ValueError(f"{name} {getattr(self, name)!r} needs a capacity, got none")

    def _check_ranks(self) -> None:
        ranks = SHARES[self.decision].reads_scores
        if ranks and self.gate == "constant":
            raise ValueError(
                "a constant gate ranks no tokens: with a capacity it needs decision 'random' or 'positional'"
            )
        if self.guidance and not (ranks and self.learn):
            raise ValueError("guidance trains scores: it needs decision 'ema_threshold' and learn true")

    def _check_passes(self) -> None:
        if self.training != "soft" and self.execution == "soft":
            raise ValueError(f"training {self.training!r} needs execution 'hard', or it trains what is not executed")
        if self.kv == "kept" and self.training != "hard":
            raise ValueError(
                f"kv 'kept' needs training 'hard', got {self.training!r}: else keys that are dropped were trained with"
            )
