"""A mixture of experts as the MLP of a block: token choice among SwiGLU experts and, optionally, no-ops.

    p = softmax(W x)                    fp32, over the experts, followed by the no-ops
    y = sum_{e in top k of p, e no no-op} g_e down_e(act(gate_e x) * up_e x)
    g = p renormalised over the k chosen ones, no-ops included (`renormalise: false`: p itself)

A no-op among the experts is the integrated form of Mixture-of-Depths-and-Experts (Raposo et al. 2024, arXiv 2404.02258,
section 4.4); the staged form is Mixture-of-Depths around a block with this MLP. Each token chooses independently of the
others, so that choices are causal and no token is dropped; padding and tokens without a query choose nothing.

The auxiliary loss of token t, whose mean over tokens is the balancing loss of Switch Transformer (arXiv 2101.03961,
equations 4 to 6) for k choices plus the z-loss of ST-MoE (arXiv 2202.08906, equation 5), is

    a X sum_e f_e p_te + b logsumexp(W x_t)^2      X experts and no-ops, f_e: share of e in the choices of this call

Balancing without a loss (arXiv 2408.15664) adds to p, for choosing only, a bias that moves by rate * sign(mean - f_e)
in each step, rate being the option `balance_rate`.

Shape letters: B rows, T tokens, C choices of a token, X experts and no-ops, D width, F neurons of an expert.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.counts import Amount, number
from skipstone.core.records import ExpertsRecord, Record, Records, expect, find
from skipstone.core.routing_module import Placement, RoutingModule
from skipstone.core.strict import parsed
from skipstone.core.tokens import Tokens, real_mask
from skipstone.core.width import FeedForward
from skipstone.nn.mlp import FixedActivation
from skipstone.ops import apply_experts, score_linear
from skipstone.ops import reference as ops
from skipstone.ops.reference import dropped

ROW_OF_16_BYTES = 8  # elements of a 16-bit type; grouped products require widths that are multiples of it


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """The options of a mixture of experts in which each token chooses its experts.

    count: number of experts. top_k: choices per token. no_op: number of additional pseudo-experts that add nothing and
    cost no FLOPs. intermediate_size: neurons of one expert, a multiple of 8; None means the dense MLP's neurons divided
    by top_k and rounded up to such a multiple, so that a token costs as much. renormalise: whether the router's weights
    of a token's choices are divided by their sum. balance_weight: coefficient of the load-balancing loss (Switch
    Transformer, arXiv 2101.03961); 0 disables it. balance_rate: step size of the bias that balances choices without a
    loss (arXiv 2408.15664); 0 disables it. z_weight: coefficient of the router z-loss (ST-MoE, arXiv 2202.08906); 0
    disables it. Raises ValueError for values out of range.
    """

    count: int = 8
    top_k: int = 2
    no_op: int = 0
    intermediate_size: int | None = None
    renormalise: bool = True
    balance_weight: float = 0.01
    balance_rate: float = 0.0
    z_weight: float = 0.0

    def __post_init__(self) -> None:
        for name, least in (("count", 1), ("top_k", 1), ("no_op", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in ("balance_weight", "balance_rate", "z_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.top_k > self.total:
            raise ValueError(f"top_k must be at most count + no_op = {self.total}, got {self.top_k}")
        if self.top_k == 1 and self.renormalise:
            raise ValueError(
                "renormalise must be false with top_k 1: a single weight would always be 1, and the router would not "
                "learn"
            )
        if self.intermediate_size is not None and (
            self.intermediate_size < 1 or self.intermediate_size % ROW_OF_16_BYTES
        ):
            raise ValueError(f"intermediate_size must be a multiple of {ROW_OF_16_BYTES}, got {self.intermediate_size}")

    @property
    def total(self) -> int:
        """The number of experts and no-ops together."""
        return self.count + self.no_op

    def neurons(self, dense: int) -> int:
        """Return the number of neurons of one expert: `intermediate_size`, or one derived from the dense MLP's if None.

        dense: the number of neurons of the dense MLP; the derived number is dense / top_k, rounded up to a multiple of
        8. `dense` is not used if `intermediate_size` is set.
        """
        return self.intermediate_size or -(-dense // (self.top_k * ROW_OF_16_BYTES)) * ROW_OF_16_BYTES


class ExpertRouter(nn.Module):
    """The router of a mixture of experts: logits W x in fp32, one for each expert and each no-op (which does nothing).

    width: number of features of x. total: number of experts and no-ops. balanced: whether there is a balancing bias, a
    buffer that is added to the softmax probabilities only to choose experts. W is a bare parameter, so that adapters
    and quantisers that replace every Linear leave it alone.
    """

    def __init__(self, width: int, total: int, balanced: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(total, width))
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", torch.zeros(total) if balanced else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weight from a normal distribution with standard deviation 0.02, and set the balancing bias to 0."""
        init.normal_(self.weight, 0.0, 0.02)
        if self.balance_bias is not None:
            init.zeros_(self.balance_bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the logits, fp32 [B, T, X], of all experts and then of the no-ops, experts that compute nothing.

        x_BTD: the MLP's input. X: number of experts plus number of no-ops.
        """
        return score_linear(x_BTD, self.weight)


class ExpertsMLP(FeedForward, RoutingModule):
    """A mixture of experts (gated MLPs) in place of a block's MLP; each token chooses `top_k` of them, or no-ops.

    width: width of the residual stream; neurons: number of neurons in the dense MLP that it replaces; both are
    multiples of 8. activation: the function applied to the gates. dropout: dropout probability for the output.
    placement: the block's index and the name under which decisions are returned; None means the name "experts". config:
    the options; None means that they are given by keyword (`options`).
    """

    activation: FixedActivation
    built_in = True
    cast_with_model = ("gate_proj", "up_proj", "down_proj")

    def __init__(
        self,
        width: int,
        neurons: int,
        activation: FixedActivation,
        dropout: float = 0.0,
        placement: Placement | None = None,
        config: ExpertsConfig | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        self.config = parsed(ExpertsConfig, config, options)
        self.placement = placement or Placement(name="experts")
        neurons, count = self.config.neurons(neurons), self.config.count
        self.router = ExpertRouter(width, self.config.total, self.config.balance_rate > 0)
        self.gate_proj = nn.Parameter(torch.empty(count, neurons, width))
        self.up_proj = nn.Parameter(torch.empty(count, neurons, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, neurons))
        self.activation = activation
        self.dropout = dropout
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights of all experts from a normal distribution with mean 0 and standard deviation 0.02."""
        for weight in (self.gate_proj, self.up_proj, self.down_proj):
            init.normal_(weight, 0.0, 0.02)

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        """Return the weighted sum of the chosen experts, [B, T, D], 0 for padding, and the record of the choices.

        x_BTD: the normalised residual stream, or its N real tokens concatenated, [1, N, D], if `tokens.unpadding` is
        set; the result has the same form. tokens: the tokens of this call, padding included. cache: not used.
        """
        x_BTD = tokens.pad(x_BTD)
        logits_BTX = self.router(x_BTD)
        share_BTX = logits_BTX.softmax(-1)
        expert_BTC, weight_BTC = self.choose(share_BTX)
        reached_BT = real_mask(tokens, x_BTD[..., 0])
        idle_BTC = self._idle(expert_BTC, None if tokens.real_BT is None else reached_BT)
        y_ND = apply_experts(
            x_BTD.flatten(0, 1),
            expert_BTC.flatten(0, 1),
            weight_BTC.flatten(0, 1),
            None if idle_BTC is None else idle_BTC.flatten(0, 1),
            self.gate_proj,
            self.up_proj,
            self.down_proj,
            self.activation.function,
        )
        chosen_BTX = torch.zeros_like(share_BTX, dtype=torch.bool).scatter(-1, expert_BTC, True) & reached_BT[..., None]
        loss_BT = self._loss(logits_BTX, share_BTX, chosen_BTX, reached_BT)
        seen_BTX = logits_BTX.detach().masked_fill(~reached_BT[..., None], float("nan"))
        return dropped(tokens.unpad(y_ND.view_as(x_BTD)), self.dropout, self.training), {
            self.placement.name: ExpertsRecord(seen_BTX, chosen_BTX, reached_BT, loss_BT)
        }

    def choose(self, share_BTX: Tensor) -> tuple[Tensor, Tensor]:
        """Return the chosen experts of each token, int64, and their weights, fp32; both [B, T, C] for C choices.

        share_BTX: the router's probabilities of experts and no-ops, fp32 [B, T, X]. The balancing bias affects the
        choice, but not the weights.
        """
        bias_X = self.router.balance_bias
        ranked_BTX = share_BTX if bias_X is None else share_BTX + bias_X
        expert_BTC = ranked_BTX.topk(self.config.top_k, dim=-1).indices
        weight_BTC = share_BTX.gather(-1, expert_BTC)
        if self.config.renormalise:
            weight_BTC = weight_BTC / weight_BTC.sum(-1, keepdim=True).clamp(min=torch.finfo(weight_BTC.dtype).tiny)
        return expert_BTC, weight_BTC

    def _idle(self, expert_BTC: Tensor, real_BT: Tensor | None) -> Tensor | None:
        """Return which choices need no computation, those of no-ops and of padding, bool [B, T, C]; None if none do.

        expert_BTC: the chosen experts of each token. real_BT: bool, False for padding; None means no padding.
        """
        no_op_BTC = expert_BTC >= self.config.count if self.config.no_op else None
        if real_BT is None:
            return no_op_BTC
        padding_BTC = ~real_BT[..., None].expand_as(expert_BTC)
        return padding_BTC if no_op_BTC is None else no_op_BTC | padding_BTC

    def _loss(self, logits_BTX: Tensor, share_BTX: Tensor, chosen_BTX: Tensor, reached_BT: Tensor) -> Tensor | None:
        """Return each token's balancing loss plus router z-loss, with coefficients, fp32 [B, T]; None if both are off.

        logits_BTX, share_BTX: the router's logits and their softmax. chosen_BTX: bool, the experts chosen. reached_BT:
        bool, False for padding, whose loss is 0.
        """
        balance, z = self.config.balance_weight, self.config.z_weight
        terms = []
        if balance:
            usage_X = self._usage(chosen_BTX, reached_BT).nan_to_num(0.0)
            terms.append(balance * self.config.total * (share_BTX * usage_X).sum(-1))
        if z:
            terms.append(z * logits_BTX.logsumexp(-1).square())
        return torch.where(reached_BT, sum(terms), 0.0) if terms else None

    def _usage(self, chosen_BTX: Tensor, reached_BT: Tensor) -> Tensor:
        return chosen_BTX.sum((0, 1)) / (reached_BT.sum() * self.config.top_k)

    def usage(self, record: ExpertsRecord) -> Tensor:
        """Return the share of a pass's choices that falls on each expert, fp32 [X]; NaN if no token came to the MLP.

        The X entries are the experts, followed by the no-ops. record: the choices of the pass; all rows of the batch
        count.
        """
        return self._usage(record.chosen_BTX, record.reached_BT)

    def statistics(self, record: Record) -> Tensor | None:
        """Return the share of a pass's choices that falls on each expert, fp32 [X]; None without a balancing bias.

        The X entries are the experts, followed by the no-ops. record: the choices of the pass. Callers average the
        result over micro-batches and processes, and `advance` uses it to move the bias.
        """
        record = expect(record, ExpertsRecord)
        return self.usage(record) if self.config.balance_rate else None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        """Raise the balancing bias of experts chosen less often than the average by `balance_rate`; lower the others'.

        progress: not used. statistics: each expert's share of the choices of the last optimizer step, fp32 [X] for X
        experts and no-ops, as `self.statistics` returns it for a pass; None changes nothing.
        """
        if self.router.balance_bias is not None and statistics is not None:
            self.router.balance_bias += self.config.balance_rate * (statistics.mean() - statistics).sign()

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.config.balance_weight > 0 or self.config.z_weight > 0

    def decay_kind(self, name: str) -> str | None:
        return super().decay_kind(name) if name.startswith("router.") else None

    def empty_record(self, x_BTD: Tensor) -> ExpertsRecord:
        nan_BTX = x_BTD.new_full((*x_BTD.shape[:2], self.config.total), float("nan"), dtype=ops.wide_dtype(x_BTD))
        return ExpertsRecord(nan_BTX, nan_BTX > 0, x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.bool))

    def set_identity(self) -> None:
        """Do nothing: mechanisms added to a model are switched off by this, but experts are the model's own MLP."""

    def flops(self, tokens: float, routing: str) -> float:
        """Return the FLOPs of the router's matrix product for `tokens` tokens of a row.

        The products of the experts are not included; the cost model counts them as the MLP's. routing: not used.
        """
        return 2 * tokens * self.router.weight.numel()

    def routing_modules(self) -> dict[str, RoutingModule]:
        return {self.placement.name: self}

    def in_words(self) -> str:
        beside = f" and {self.config.no_op} no-ops" if self.config.no_op else ""
        neurons, activation = self.down_proj.shape[-1], self.activation.name
        return f"{self.config.count} experts of {neurons} neurons ({activation}){beside}, top {self.config.top_k}"

    def weights_per_pass(self) -> int:
        return sum(weight.numel() for weight in (self.gate_proj, self.up_proj, self.down_proj)) // self.config.count

    def dense_passes(self, tokens: float) -> float:
        """Return how many evaluations of an expert `tokens` tokens need if no choice is a no-op: `top_k` per token."""
        return tokens * self.config.top_k

    def passes(self, tokens: float, kept: Mapping[str, Amount], single_token: bool = False) -> float | Fraction:
        """Return how many evaluations of an expert `tokens` tokens of a row need; choices of no-ops need none.

        kept: numbers of evaluations per row that were measured in a forward pass, by name, as the method `measured`
        returns them; the one of this MLP is returned. If there is none, all experts and no-ops are assumed to be chosen
        equally often. single_token: not used.
        """
        promised = self.dense_passes(tokens) * self.config.count / self.config.total
        return number(kept.get(self.placement.name, promised))

    def measured(self, records: Records) -> dict[str, Fraction]:
        """Return {name: how many evaluations of an expert a row of the pass needed, on average}.

        name: the name under which the MLP's choices are returned. Choices of no-ops and of padding are not counted.
        records: the decisions recorded in the pass, by name. The dict is empty if they contain none of this MLP.
        """
        record = find(records, self.placement.name, ExpertsRecord)
        if record is None:
            return {}
        chosen_BTX = record.chosen_BTX[..., : self.config.count]
        return {self.placement.name: Fraction(int(chosen_BTX.sum()), len(chosen_BTX))}

    def token_passes(self, records: Records) -> Tensor:
        """Return the number of each token's choices that are not no-ops, int64 [B, T] on the CPU; 0 for padding.

        records: the decisions recorded in a forward pass, by name.
        """
        record = find(records, self.placement.name, ExpertsRecord)
        assert record is not None
        return record.chosen_BTX[..., : self.config.count].sum(-1).cpu()

    def inactive_weights(self) -> int:
        return self.weights_per_pass() * max(self.config.count - self.config.top_k, 0)

    def entropy(self, record: ExpertsRecord) -> Tensor:
        """Return the entropy of each token's router probabilities divided by the largest possible, ln X, fp32 [B, T].

        X: the number of experts and no-ops. record: the router's logits and choices in a pass. The entropy is NaN for
        tokens that did not reach the MLP.
        """
        return torch.special.entr(record.logits_BTX.softmax(-1)).sum(-1) / math.log(max(self.config.total, 2))
