"""Token-Selective Attention (Mohammed 2026, arXiv 2605.05222).

    p_i = sigmoid(w2 . relu(W1 x_i + b1) + b2)              x the raw residual stream before the block
    h  <- h + (1 - p) * Attn(LN1(h))
    h  <- h + (1 - p) * FFN(LN2(h))                         one p for both
    loss = CE + depth_weight * mean over gated blocks and tokens of (1 - p)

Hard execution skips tokens with p >= threshold: no query, no output projection, no FFN; their keys and values are
computed from the carried-forward h, as in the paper. Differences from the paper: a kept token keeps its gain 1 - p by
default (`hard_gain: gate`); the paper's sparse mode gives it 1 (`hard_gain: one`), which costs up to .06 nats. The
paper trains with soft gates only; training with hard gates, keeping a given share of tokens (`capacity`) and the
controls are ours.

Shape letters: B rows, T tokens, K kept tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from skipstone.core.counts import TokenCounts
from skipstone.core.records import DepthRecord, Record, Records, expect, lift
from skipstone.core.seam import Update
from skipstone.core.stream_gate import EVERY, Line, StreamGate
from skipstone.core.strict import choose
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.base import DepthMechanism, Placement, real_mask
from skipstone.mechanisms.decisions import DECISIONS, Decision, build_decision
from skipstone.mechanisms.gating import apply_gate, is_hard, straight_through
from skipstone.mechanisms.guidance import guided
from skipstone.mechanisms.option_threshold import OptionThreshold
from skipstone.mechanisms.routers import ConstantRouter, MLPRouter, hidden_width, scorer_of
from skipstone.mechanisms.schedules import Capacity, Ramp, capacity_at, require_capacities

NEUTRAL_SCORE = 9.0  # a gate of 1 - 1.2e-4, with a gradient that does not vanish

SHARES = {name: DECISIONS[name] for name in ("ema_threshold", "random", "positional")}  # same in oracle and causal


@dataclass(frozen=True, kw_only=True)
class TokenSelectiveConfig:
    """The options of Token-Selective Attention, where a token's skip probability p scales its updates by 1 - p.

    The gate: start_bias: initial bias of the logit of p (-1: p is .27). router_width: hidden width of the router; None
    means a quarter of the model width, at least 16. router_norm: whether the router's input is divided by its root mean
    square; None means only with guidance. gate: "token", p computed from each token, or "constant", one learned p for
    the block. learn: False freezes the router. depth_weight: coefficient of the mean of 1 - p in the loss.

    Passes: execution: what evaluation and generation do: "hard" skips tokens, "soft" only scales updates. training:
    what training does: "soft"; "hard" (skips tokens as a hard execution does); or "straight_through" (the values of
    "hard" and the gradient of all gates, for which every token is computed). threshold: the p, in (0, 1), at or above
    which a token is skipped. hard_gain: factor on the update of a kept token when others are skipped, "gate" (1 - p) or
    "one".

    A fixed share instead of the threshold: capacity: share of tokens that each gated block keeps, in (0, 1]: one
    number, a list with one for each gated block, or a `Ramp` {start, end, shape} over depth; None means that the
    threshold decides. capacity_warmup: fraction of the training over which the capacity falls from 1. decision:
    "ema_threshold" (p below a running quantile), or "random" or "positional" as controls. guidance: whether the router
    learns from the gradient norms at the block's output (`guided`), with coefficient auxiliary_weight; it then sends no
    gradient into the model. kv: whether skipped tokens provide keys and values, "full" (yes) or "kept" (no). Raises
    ValueError for values out of range and options that exclude each other.
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
            raise ValueError(
                f"training {self.training!r} needs execution 'hard', because it would otherwise train a pass that is "
                "not executed"
            )
        if self.kv == "kept" and self.training != "hard":
            raise ValueError(
                f"kv 'kept' needs training 'hard', got {self.training!r}: otherwise training would use keys that "
                "execution drops"
            )


class TokenSelective(DepthMechanism):
    """Token-Selective Attention (arXiv 2605.05222): updates are scaled by 1 - p, and tokens with high p skip.

    A small MLP computes the skip probability p of each token from the hidden state before the block. Skipped tokens
    provide keys and values unless the option `kv` is "kept". hidden_size: width of the model. placement: the block in
    which it is used; None outside of a model. Options are the fields of `TokenSelectiveConfig`, as keyword arguments or
    as `config`.
    """

    Config = TokenSelectiveConfig
    default_layers = "1:"
    budget_by = "threshold"
    has_auxiliary_loss = True

    def __init__(self, hidden_size: int, placement: Placement | None = None, **options: object) -> None:
        super().__init__(hidden_size, placement, **options)
        self.router = self._build_router().requires_grad_(self.config.learn)
        self.decision = self._build_decision()

    def _build_router(self) -> MLPRouter | ConstantRouter:
        if self.config.gate == "constant":
            return ConstantRouter(self.config.start_bias)
        width = self.config.router_width or hidden_width(self.hidden_size)
        return MLPRouter(self.hidden_size, width, self.config.start_bias, bool(self.config.router_norm))

    def _build_decision(self) -> Decision | None:
        """Build the decision that keeps a capacity; None if the threshold of the options decides."""
        config: TokenSelectiveConfig = self.config
        if config.capacity is None:
            return None
        capacity = Capacity(capacity_at(config.capacity, self.placement), config.capacity_warmup)
        layer, key = self.placement.layer, self.placement.noise_key
        return build_decision(config.decision, capacity, self.hidden_size, layer, noise_key=key)

    @property
    def capacity(self) -> float | None:
        """The share of a document's tokens that are kept by passes that skip the others, after any warm-up.

        None if a threshold decides.
        """
        return None if self.decision is None else self.decision.capacity.final

    @property
    def _share(self) -> float:
        return 1.0 if self.capacity is None else self.capacity

    @property
    def intended_share(self) -> float | None:
        return None if self.config.training == "soft" or self.decision is None else self.decision.capacity.now

    @property
    def chooses_by_score(self) -> bool:
        return self.config.learn and (self.decision is None or self.decision.reads_scores)

    @property
    def skips(self) -> bool:
        return self.config.execution == "hard" and (self.decision is None or self._share < 1)

    @property
    def follows_scores(self) -> bool:
        return self.decision is not None and bool(self.decision.moving())

    def score_threshold(self) -> ScoreThreshold | None:
        if not self.skips:
            return None
        return OptionThreshold(self, keeps_above=False) if self.decision is None else self.decision.score_threshold()

    def moving(self) -> dict[str, Tensor]:
        found = {} if self.decision is None else self.decision.moving()
        return {self.log_name(kind): value for kind, value in found.items()}

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the block's update scaled by 1 - p, p being a token's skip probability, [B, T, D], and the records.

        update: computes the wrapped block's update, as update(x, tokens) -> (update, records). x_BTD: the hidden states
        that enter the block. tokens: the tokens of this call. The factor is on the updates of attention and MLP
        separately; with `hard_gain: one` it is 1 in passes that skip tokens. The records hold the decisions by
        mechanism name; a recorded score is the logit of 1 - p. A pass that computes every token records all tokens as
        kept; those that straight-through training treats as skipped have weight 0.
        """
        score_BT = self._score(x_BTD)
        open_BT, reached_BT = score_BT.sigmoid(), real_mask(tokens, score_BT)
        gain_BT, kept_BT = self._decide(score_BT, open_BT, x_BTD, tokens)
        if kept_BT is not None and tokens.real_BT is not None:
            kept_BT = reached_BT & kept_BT
        if kept_BT is not None and self.config.kv == "kept":
            delta_BTD, inner = self._alone(update, x_BTD, tokens, gain_BT, kept_BT)
        else:
            delta_BTD, inner = apply_gate(update, x_BTD, tokens, gain_BT, kept_BT, self.capacity)
        loss_BT = open_BT * (self.config.depth_weight / self.placement.count)
        if self.config.guidance and self._share < 1 and self._trains(tokens):
            delta_BTD, guided_BT = guided(delta_BTD, score_BT, reached_BT, self._share)
            loss_BT = loss_BT + guided_BT * self.config.auxiliary_weight
        shown_BT = reached_BT if kept_BT is None else kept_BT
        records = self.record(
            score_BT=score_BT,
            kept_BT=shown_BT,
            weight_BT=shown_BT.to(score_BT.dtype) if gain_BT is None else gain_BT * shown_BT,
            reached_BT=reached_BT,
            loss_BT=loss_BT if tokens.real_BT is None else torch.where(reached_BT, loss_BT, 0.0),
        )
        return delta_BTD, {**records, **inner}

    def _score(self, x_BTD: Tensor) -> Tensor:
        """Return the logit of 1 - p, fp32 [B, T]."""
        seen_BTD = x_BTD.detach() if self.config.guidance else x_BTD
        score_BT = -self.router(seen_BTD)
        return score_BT if self.config.learn else score_BT.detach()

    def _trains(self, tokens: Tokens) -> bool:
        return tokens.mode.routing == "oracle" and tokens.forced_BT is None

    def _decide(
        self, score_BT: Tensor, open_BT: Tensor, x_BTD: Tensor, tokens: Tokens
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the factor on each token's update (None means 1), and which tokens are computed (None means all).

        score_BT: the logits of open_BT = 1 - p. Padding may be among the tokens computed.
        """
        kept_BT = self._keeps(score_BT, open_BT, x_BTD, tokens)
        if kept_BT is None:
            return open_BT, None
        gain_BT = open_BT if self.config.hard_gain == "gate" else None
        if self.config.training == "straight_through" and self._trains(tokens):
            return straight_through(open_BT, gain_BT, kept_BT), None
        return gain_BT, kept_BT

    def _keeps(self, score_BT: Tensor, open_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor | None:
        """Return the tokens to keep, bool [B, T]; None in a pass that skips none.

        score_BT: the logits of open_BT = 1 - p.
        """
        if tokens.forced_BT is not None:
            return tokens.forced_BT.expand_as(open_BT)
        hard = self.config.training != "soft" if self._trains(tokens) else is_hard(self.config.execution, tokens)
        if not hard:
            return None
        if self.decision is None:
            return open_BT > 1 - self.config.threshold
        if self.decision.capacity.now >= 1:
            return torch.ones_like(open_BT, dtype=torch.bool)
        decide = self.decision.causal if tokens.mode.routing == "causal" else self.decision.oracle
        return decide(score_BT, x_BTD, tokens)

    def stream_gate(self) -> StreamGate | None:
        config, scorer = self.config, scorer_of(self.router)
        hard = config.execution == "hard"
        line: Line | None = EVERY
        if hard and self.decision is None:
            line = Line(1 - config.threshold)
        elif hard and self.decision is not None and self.decision.capacity.now < 1:
            line = self.decision.stream_line()
        if line is None or scorer is None:
            return None
        return StreamGate(
            scorer=scorer,
            line=line,
            sign=-1.0,
            compares="opening" if self.decision is None else "score",
            weight="none" if hard and config.hard_gain == "one" else "opening",
            acts_on="sublayers",
            others="absent" if config.kv == "kept" else "keys",
            loss=config.depth_weight / self.placement.count,
        )

    def _alone(
        self, update: Update, x_BTD: Tensor, tokens: Tokens, gain_BT: Tensor | None, kept_BT: Tensor
    ) -> tuple[Tensor, Records]:
        """Return the update, [B, T, D], and the inner records, of a block that sees kept tokens alone.

        Skipped tokens give no keys and values. update is as in `forward`. gain_BT: the factor on updates; None means 1.
        """
        part = tokens.select_kept(kept_BT)
        if part.is_empty:
            return x_BTD * 0, {}
        inside = (tokens if gain_BT is None else tokens.scaled(gain_BT)).select(part)
        delta_BKD, inner = update(part.gather(x_BTD), inside)
        return part.scatter(delta_BKD), lift(inner, part, tokens.state)

    def statistics(self, record: Record) -> Tensor | None:
        record = expect(record, DepthRecord)
        return None if self.decision is None else self.decision.statistics(record.score_BT.detach(), record.reached_BT)

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        if self.decision is not None:
            self.decision.advance(statistics)
            self.decision.capacity.advance(progress)

    def not_ready_reason(self) -> str | None:
        if self.decision is None or not self.skips:
            return None
        return self.decision.capacity.not_ready_reason() or self.decision.not_ready_reason()

    def set_identity(self) -> None:
        """Set every token's skip probability p to 1.2e-4 and keep every token, so that the model is nearly a dense one.

        The gate, the factor 1 - p on a token's updates, is then nearly 1.
        """
        self.router.constant(-NEUTRAL_SCORE)
        if self.decision is not None:
            self.decision.capacity.pin(1.0)

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return how many tokens of a row the block works on, given how many reach the mechanism (`counts`).

        Counts are means per row. kept: the tokens kept in a measured pass, as counts or as one number; None means that
        nothing was measured: the configured capacity is then assumed, or all tokens if there is none or `execution` is
        "soft". oracle: whether this is a training pass, which skips tokens only with the option `training: hard`.
        Skipped tokens count as keys and values unless the option `kv` is "kept".
        """
        if oracle and self.config.training != "hard":
            return counts
        if kept is None and (self._share >= 1 or self.config.execution == "soft"):
            return counts
        inside = counts.restricted_to(self._share * counts.kv_tokens if kept is None else kept)
        return (
            TokenCounts(kv_tokens=counts.kv_tokens, query_tokens=inside.query_tokens, rows=counts.rows)
            if self.config.kv == "full"
            else inside
        )

    def flops(self, tokens: float, routing: str) -> float:
        return self.router.flops(tokens)

    def backward_flops(self, tokens: float) -> float:
        if not self.config.learn:
            return 0
        return self.router.weight_flops(tokens) if self.config.guidance else 2 * self.router.flops(tokens)
