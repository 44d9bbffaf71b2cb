"""Mixture-of-Depths (Raposo et al. 2024, arXiv 2404.02258).

    x_i <- x_i + w(r_i) * Delta_i(X_kept)   if token i is kept        r_i = router(x_i)
    x_i <- x_i                              otherwise

Kept tokens attend to kept tokens only. Delta is the block's update, w the option `weight`; capacity 1 with w = 1 is the
dense model. Differences from the paper: k = floor(capacity * length) of each document, padding excluded; `decisions`
has the causal decisions. Options from later papers, each in its file: `tanh` weights and a capacity that falls over
depth (p-MoD, arXiv 2412.04449), a threshold in place of top-k (MoDification, arXiv 2410.14268), keys and values of
skipped tokens (`kv: full`, FlexiDepth, arXiv 2503.23798, without its adapter for skipped tokens), a low-rank update for
skipped tokens (Informed Routing, arXiv 2510.13831), a z-loss and a warm-up of the capacity (Mixture-of-Recursions,
arXiv 2507.10524; with a single logit the z-loss is score^2). The option `on` routes attention or MLP alone.

Shape letters: B rows, T tokens, K kept tokens, D width.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.counts import TokenCounts
from skipstone.core.noise import token_noise
from skipstone.core.records import DepthRecord, Record, Records, expect, lift
from skipstone.core.seam import Update
from skipstone.core.stream_gate import EVERY, StreamGate, by_ids
from skipstone.core.strict import PlainDict
from skipstone.core.threshold import ScoreThreshold
from skipstone.core.tokens import IDS, Tokens
from skipstone.mechanisms.base import DepthMechanism, Placement, real_mask
from skipstone.mechanisms.benefit import benefit_loss
from skipstone.mechanisms.decisions import DECISIONS, build_decision
from skipstone.mechanisms.exploration import Exploration
from skipstone.mechanisms.guidance import guided
from skipstone.mechanisms.mixture_options import WEIGHTS as WEIGHTS
from skipstone.mechanisms.mixture_options import MixtureOfDepthsConfig as MixtureOfDepthsConfig
from skipstone.mechanisms.routers import LinearRouter, NoRouter, build_router, scorer_of
from skipstone.mechanisms.schedules import Capacity, capacity_at
from skipstone.mechanisms.skip_path import LowRankSkip
from skipstone.ops import reference as ops


class MixtureOfDepths(DepthMechanism):
    """Mixture-of-Depths (arXiv 2404.02258): a router keeps a share of the tokens for a block, and the others skip it.

    Kept tokens attend to kept tokens only (with `kv: full`, to all) and get w(score) * update, w being the option
    `weight`, such as a sigmoid; skipped tokens get nothing, or a learned low-rank update. hidden_size: width of the
    model. placement: the block in which it is used; None outside of a model. Options are the fields of
    `MixtureOfDepthsConfig`, as keyword arguments or as `config`. adapt_defaults: options that `skipstone adapt`, which
    turns a dense model into a routed one, sets if its recipe does not.
    """

    Config = MixtureOfDepthsConfig
    default_layers = "1::2"
    budget_by = "capacity"
    cast_with_model = ("skip", "tanh_scale")
    # These let it start as the dense model: all tokens kept at first, with weight 1. The decision is the same in
    # training and generation; inputs are normalised, because the residual stream of pretrained models grows over depth.
    adapt_defaults: ClassVar[PlainDict] = {
        "weight": "tanh",
        "decision": "ema_threshold",
        "capacity_warmup": 0.5,
        "router_norm": True,
    }

    def __init__(self, hidden_size: int, placement: Placement | None = None, **options: object) -> None:
        super().__init__(hidden_size, placement, **options)
        config: MixtureOfDepthsConfig = self.config
        self.weighting = config.weight
        routed = config.weight != "none" or not DECISIONS[config.decision].reads_ids
        norm = bool(config.router_norm)
        self.router = build_router(config.router, hidden_size, norm) if routed else NoRouter()
        capacity = Capacity(capacity_at(config.shares, self.placement), config.capacity_warmup, config.warmup_shape)
        self.decision = build_decision(
            config.decision,
            capacity,
            hidden_size,
            self.placement.layer,
            config.threshold,
            norm=bool(config.router_norm),
            noise_key=self.placement.noise_key,
            boundary=config.boundary,
        )
        self.exploration = Exploration(config.exploration, config.exploration_until) if config.exploration else None
        self.skip = LowRankSkip(hidden_size, config.skip_rank) if config.skip == "low_rank" else None
        self.tanh_scale = nn.Parameter(torch.zeros(())) if self.weighting == "tanh" else None

    @property
    def capacity(self) -> float:
        """The share of a document's tokens that the block keeps after any warm-up.

        `decision.capacity.now` is the current share.
        """
        return self.decision.capacity.final

    def set_capacity(self, capacity: float) -> None:
        self.decision.capacity.pin(capacity)

    @property
    def skips(self) -> bool:
        return self.capacity < 1

    @property
    def intended_share(self) -> float:
        return self.decision.capacity.now

    @property
    def chooses_by_score(self) -> bool:
        return self.decision.reads_scores and not self.decision.imposed

    @property
    def has_auxiliary_loss(self) -> bool:
        guided = (bool(self.config.guidance) or self.config.benefit) and self.capacity < 1
        return self.decision.has_loss or guided or self.config.z_loss > 0

    @property
    def learns_benefit(self) -> bool:
        return self.config.benefit and self.capacity < 1

    @property
    def needs_masks(self) -> bool:
        return self.decision.imposed and self.capacity < 1

    @property
    def reads_ids(self) -> bool:
        return self.decision.reads_ids and self.capacity < 1

    @property
    def follows_scores(self) -> bool:
        return bool(self.decision.moving())

    def score_threshold(self) -> ScoreThreshold | None:
        return self.decision.score_threshold() if self.skips else None

    def moving(self) -> dict[str, Tensor]:
        return {self.log_name(kind): value for kind, value in self.decision.moving().items()}

    def fitted_parts(self) -> tuple[LinearRouter | None, LowRankSkip | None]:
        return self.router if isinstance(self.router, LinearRouter) else None, self.skip

    def reset_parameters(self) -> None:
        """Set the scale a of the weight 1 + a tanh(score), if that is used, to 0, so that every weight starts at 1."""
        if self.tanh_scale is not None:
            init.zeros_(self.tanh_scale)

    def forward(self, update: Update, x_BTD: Tensor, tokens: Tokens) -> tuple[Tensor, Records]:
        """Return the weighted update of kept tokens, 0 or a low-rank update for others, [B, T, D], and the records.

        update: computes the wrapped block's update, as update(x, tokens) -> (update, records). x_BTD: the hidden states
        that enter the block. tokens: the tokens of this call. The records hold this decision and those made inside, by
        mechanism name.
        """
        seen_BTD = x_BTD.detach() if self.config.guidance or self.config.benefit else x_BTD
        score_BT = self.router(seen_BTD)
        reached_BT = real_mask(tokens, score_BT)
        kept_BT = self.decide(score_BT, seen_BTD, tokens) & reached_BT
        weight_BT = torch.where(kept_BT, WEIGHTS[self.weighting](score_BT, self.tanh_scale), 0.0)
        execute = self._with_all_keys if self.config.kv == "full" else self._alone
        delta_BTD, inner = execute(update, x_BTD, tokens, kept_BT, weight_BT)
        if self.skip is not None:
            delta_BTD = delta_BTD + self.skip(x_BTD, reached_BT & ~kept_BT, tokens)
        guided_BT = None
        if self.config.guidance and self.capacity < 1 and self._learns(tokens):
            delta_BTD, guided_BT = guided(delta_BTD, score_BT, reached_BT, self.capacity)
        records = self.record(
            score_BT=score_BT,
            kept_BT=kept_BT,
            weight_BT=weight_BT,
            reached_BT=reached_BT,
            loss_BT=self._loss(score_BT, kept_BT, reached_BT, seen_BTD, guided_BT, tokens),
        )
        return delta_BTD, {**records, **inner}

    def stream_gate(self) -> StreamGate | None:
        if self.reads_ids and self.decision.capacity.now < 1 and self.weighting == "none" and self.skip is None:
            return by_ids(f"kept/{self.placement.layer}/{self.placement.name}", self.config.kv)
        line = EVERY if self.decision.capacity.now >= 1 else self.decision.stream_line()
        if line is None or self.skip is not None or (scorer := scorer_of(self.router)) is None:
            return None
        return StreamGate(
            scorer=scorer,
            line=line,
            weight="opening" if self.weighting == "sigmoid" else self.weighting,  # type: ignore[arg-type]
            scale=self.tanh_scale,
            others="keys" if self.config.kv == "full" else "absent",
        )

    def kept_by_ids(self, tokens: Tokens) -> Tensor:
        score_BT = torch.zeros_like(tokens.state.get(IDS, tokens.slot_BT), dtype=torch.float32)
        return self.decision.causal(score_BT, score_BT, tokens)

    def decide(self, score_BT: Tensor, seen_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return the tokens to keep, bool [B, T]; padding may be among them, so callers have to exclude it.

        score_BT: router scores, fp32. seen_BTD: the hidden states as the router reads them, for decisions that a
        network of their own makes. tokens: the tokens of this call; their `mode.routing` and `forced_BT` say how to
        decide: looking at the whole row ("oracle" routing), without later tokens ("causal"), or as the caller imposes
        (`forced_BT`). Raises ValueError in a causal pass if the decision needs later tokens.
        """
        if tokens.forced_BT is not None:
            return tokens.forced_BT.expand_as(score_BT)
        if self.decision.capacity.now >= 1:
            return torch.ones_like(score_BT, dtype=torch.bool)
        if tokens.mode.routing == "causal":
            self.require_causal()
            return self.decision.causal(score_BT, seen_BTD, tokens)
        if self._explores(tokens):
            assert self.exploration is not None
            held = None if self.decision.static else self.decision.capacity.now
            noise_BT = token_noise(tokens, self.placement.noise_key, len(score_BT))
            score_BT = self.exploration(score_BT, noise_BT, real_mask(tokens, score_BT), held)
        return self.decision.oracle(score_BT, seen_BTD, tokens)

    def _explores(self, tokens: Tokens) -> bool:
        return self.exploration is not None and tokens.mode.noise and not self.exploration.progress.over

    def _alone(
        self, update: Update, x_BTD: Tensor, tokens: Tokens, kept_BT: Tensor, weight_BT: Tensor
    ) -> tuple[Tensor, Records]:
        """Return the weighted update, [B, T, D], and the inner records, of a block that sees kept tokens alone.

        Skipped tokens give no keys and values. update is as in `forward`. weight_BT: the factor on the update.
        """
        part = tokens.select_kept(kept_BT, *self._width(tokens))
        if part.is_empty and not torch.is_grad_enabled():
            return torch.zeros_like(x_BTD), {}
        if part.is_empty:
            return x_BTD * 0 + (weight_BT * 0)[..., None].to(x_BTD.dtype), {}
        delta_BKD, inner = update(part.gather(x_BTD), tokens.select(part))
        delta_BKD = delta_BKD * part.gather(weight_BT)[..., None].to(delta_BKD.dtype)
        return part.scatter(delta_BKD), lift(inner, part, tokens.state)

    def _with_all_keys(
        self, update: Update, x_BTD: Tensor, tokens: Tokens, kept_BT: Tensor, weight_BT: Tensor
    ) -> tuple[Tensor, Records]:
        """Return the weighted update, [B, T, D], and the inner records, of a block that sees all tokens as keys.

        The update is 0 for tokens that are not kept. update is as in `forward`. weight_BT: the factor on the update.
        """
        delta_BTD, inner = update(x_BTD, tokens.restrict_queries(kept_BT, *self._width(tokens), share=self.capacity))
        return delta_BTD * weight_BT[..., None].to(delta_BTD.dtype), inner

    def _width(self, tokens: Tokens) -> tuple[int | None, bool]:
        """Return the number of tokens to gather per row, and whether every row keeps exactly that many.

        The number is None if it is not known before the decision.
        """
        capacity = self.decision.capacity.now
        static = capacity >= 1 or (tokens.mode.routing == "oracle" and self.decision.static)
        if tokens.forced_BT is not None or not static or self.decision.imposed:
            return None, False
        return ops.quota(capacity, tokens.length), tokens.group_BT is None

    def _learns(self, tokens: Tokens) -> bool:
        """Return whether the pass trains the router on its own decisions: only if they look at the whole row.

        Without sight of later tokens, the decision follows from the scores, and the router would learn to repeat
        itself.
        """
        return tokens.mode.routing == "oracle" and tokens.forced_BT is None

    def _loss(
        self,
        score_BT: Tensor,
        kept_BT: Tensor,
        reached_BT: Tensor,
        seen_BTD: Tensor,
        guided_BT: Tensor | None,
        tokens: Tokens,
    ) -> Tensor | None:
        if not self._learns(tokens):
            return None
        if self._explores(tokens) and self.decision.capacity.now < 1:  # the target is what it would keep without noise
            kept_BT = self.decision.oracle(score_BT, seen_BTD, tokens) & reached_BT
        loss_BT = self.decision.loss(score_BT, kept_BT, seen_BTD, reached_BT)
        if self.learns_benefit:
            guided_BT = benefit_loss(score_BT, tokens, self.placement.layer)
        terms = [x_BT * self.config.auxiliary_weight for x_BT in (loss_BT, guided_BT) if x_BT is not None]
        if self.config.z_loss:
            terms.append(score_BT.square() * self.config.z_loss)
        return torch.where(reached_BT, sum(terms), 0.0) if terms else None  # type: ignore[arg-type]

    def oracle_mask(self, record: DepthRecord) -> Tensor | None:
        """Return the top `capacity` share, by recorded score, of each row's tokens that reached the block, bool [B, T].

        It is None if decisions do not depend on scores. record: the mechanism's record of a pass.
        """
        if not self.decision.reads_scores:
            return None
        return ops.select_top(record.score_BT, self.capacity, torch.where(record.reached_BT, 0, -1))

    def statistics(self, record: Record) -> Tensor | None:
        record = expect(record, DepthRecord)
        return self.decision.statistics(record.score_BT.detach(), record.reached_BT)

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        self.decision.advance(statistics)
        self.decision.capacity.advance(progress)
        if self.exploration is not None:
            self.exploration.progress.advance(progress)

    def not_ready_reason(self) -> str | None:
        return (
            self.decision.capacity.not_ready_reason() or self.decision.not_ready_reason() if self.capacity < 1 else None
        )

    def require_causal(self) -> None:
        if self.capacity < 1:
            self.decision.require_causal()

    def start_as_dense(self) -> None:
        """Do nothing when a dense model begins to be adapted: the capacity's warm-up starts with all tokens kept.

        `adapt_defaults` turns the warm-up on.
        """

    def set_identity(self) -> None:
        """Keep every token with weight 1 from now on, so that the model computes what it would without the mechanism.

        The capacity becomes 1. The weight becomes "none", or with "tanh" its scale becomes 0.
        """
        self.decision.capacity.pin(1.0)
        if self.tanh_scale is None:
            self.weighting = "none"
        else:
            with torch.no_grad():
                self.tanh_scale.zero_()

    def counts_inside(
        self, counts: TokenCounts, kept: TokenCounts | float | None = None, oracle: bool = False
    ) -> TokenCounts:
        """Return how many tokens of a row the block works on, given how many reach the mechanism (`counts`).

        Counts are means per row. Skipped tokens are not counted; with `kv: full` they count as keys and values. kept:
        the tokens kept in a measured pass, as counts or as one number; None means that the configured capacity is
        assumed. oracle: whether this is a training pass; with a decision such as top-k, it then computes floor(capacity
        * tokens) tokens whatever was measured.
        """
        static = oracle and self.decision.static
        if kept is None:
            inside = counts.restricted_to(
                ops.quota(self.capacity, int(counts.kv_tokens)) if static else self.capacity * counts.kv_tokens
            )
        else:
            inside = counts.restricted_to(kept)
            if static:
                width = ops.quota(self.decision.capacity.now, int(counts.kv_tokens))
                inside = TokenCounts(
                    kv_tokens=width,
                    query_tokens=width if counts.query_tokens == counts.kv_tokens else inside.query_tokens,
                    rows=counts.rows,
                )
        return (
            TokenCounts(kv_tokens=counts.kv_tokens, query_tokens=inside.query_tokens, rows=counts.rows)
            if self.config.kv == "full"
            else inside
        )

    def flops(self, tokens: float, routing: str) -> float:
        decides = routing == "oracle" or (routing == "causal" and self.capacity < 1)
        decision = self.decision.flops(tokens, routing) if decides else 0
        return self.router.flops(tokens) + decision + (0 if self.skip is None else self.skip.flops(tokens))

    def backward_flops(self, tokens: float) -> float:
        learns = self.weighting != "none" or self.decision.trains_router or self.config.z_loss > 0
        router = 2 * self.router.flops(tokens) if learns else 0
        if self.config.guidance or self.config.benefit:
            router = self.router.weight_flops(tokens) if learns or self.capacity < 1 else 0
        return router + self.decision.backward_flops(tokens) + (0 if self.skip is None else 2 * self.skip.flops(tokens))
