"""Neuron groups: a router turns groups of an MLP's neurons off for a chunk of tokens; they are not multiplied.

    c      = exponential mean of W_c x over the document's tokens up to the first one of the chunk
    score  = W_s relu(c + b_c) + b_s              one number for each group of `group_size` neurons
    kept   = the floor(capacity G) groups with the highest score (plus their balance, if any)
    y      = W_down[kept] ( gain * act(W_gate[kept] x) * W_up[kept] x ),    gain = 2 sigmoid(score)

The router ranks the groups of a chunk, not the tokens of a row, so the share is exact and decisions are causal:
training decides and computes as generation does. The router learns from the gain of the groups that it keeps. Chunks
serve decoding: during a chunk, every step reads the same part of the weights.

`decision: magnitude` needs no router: see `magnitude.py`.

The method is ours. Related are GRIFFIN (arXiv 2404.01365, training-free), which uses the neurons of a prompt for the
text that follows, and mixtures of many small experts, of which this is one with a decision per chunk and the storage of
a dense MLP. Balancing without a loss follows arXiv 2408.15664: a bias on the ranking alone, moved in each step by
balance_rate * sign(mean - share), where share is the share of tokens for which a group is on.

Shape letters: B rows, T tokens, D width, R projected width, G groups, K kept groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import NeuronGroupsRecord, Record, expect
from skipstone.core.routing_module import Placement
from skipstone.core.strict import parsed
from skipstone.core.tokens import Tokens, real_mask
from skipstone.core.width import GroupChoice, InputGroupRouter, Share
from skipstone.mechanisms.contexts import Memory, chunk_start
from skipstone.mechanisms.grouping import NAME as NAME
from skipstone.mechanisms.grouping import GroupingConfig, ScheduledGroups
from skipstone.ops import reference as ops
from skipstone.ops import score_linear


@dataclass(frozen=True, kw_only=True)
class NeuronGroupsConfig(GroupingConfig):
    """The options of neuron groups that a router chooses for a chunk of tokens.

    group_size: neurons per group. capacity: share of the groups that is on for a token, in (0, 1]. capacity_warmup:
    fraction of the training, in [0, 1), over which the capacity falls from 1. left: the number of groups left after
    pruning, one per layer; None means that nothing was pruned. chunk_size: number of consecutive tokens of a document
    that share a decision. decay: a number in (0, 1); the router reads a mean over tokens in which a token n places back
    has weight decay^n. router_width: width R to which the input is projected. balance_rate: how far a bias, added to a
    group's score for ranking, moves per step so that all groups are used equally often; 0 means no bias. decision:
    "learned", or "random" as a control. Raises ValueError for values out of range.
    """

    chunk_size: int = 64
    decay: float = 0.95
    router_width: int = 32
    balance_rate: float = 0.0
    decision: Literal["learned", "random"] = "learned"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk_size", "router_width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.decay < 1:
            raise ValueError(f"decay must be in (0, 1), got {self.decay}")
        if not self.balance_rate >= 0:
            raise ValueError(f"balance_rate must not be negative, got {self.balance_rate}")


class NeuronGroups(ScheduledGroups, InputGroupRouter):
    """A router that chooses for each chunk of tokens which groups of an MLP's neurons are multiplied (on).

    It scores the groups from an exponential mean of the tokens up to the chunk's first one, keeps the best ones, as
    many as the share `capacity` of the groups before pruning, and multiplies their output by 2 sigmoid(score), through
    which it learns. hidden_size: width of the MLP's input. neurons: MLP neurons before pruning. placement: the block in
    which it is used; None outside of a model. config: the options, or pass its fields as keyword arguments.
    """

    Config: ClassVar[type[NeuronGroupsConfig]] = NeuronGroupsConfig

    def __init__(
        self,
        hidden_size: int,
        neurons: int,
        placement: Placement | None = None,
        config: NeuronGroupsConfig | None = None,
        **options: object,
    ) -> None:
        """Build the router.

        hidden_size: width D of the MLP's input. neurons: number of the MLP's neurons before pruning. placement: the
        block of the router; None means block 0. config: the options; if None, `options`, the fields of
        `NeuronGroupsConfig`, are parsed.
        """
        read = parsed(NeuronGroupsConfig, config, options)
        super().__init__(read, neurons, placement)
        self.config = read
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", torch.zeros(self.total) if self.config.balance_rate else None)
        self.learns = self.config.decision == "learned"
        if self.learns:
            R = self.config.router_width
            self.context_weight = nn.Parameter(torch.empty(R, hidden_size))
            self.context_bias = nn.Parameter(torch.empty(R))
            self.score_weight = nn.Parameter(torch.empty(self.total, R))
            self.score_bias = nn.Parameter(torch.empty(self.total))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw both projections of the router from a normal distribution of variance 1 / fan-in; set biases to 0."""
        if self.balance_bias is not None:
            init.zeros_(self.balance_bias)
        if self.learns:
            init.normal_(self.context_weight, 0.0, self.context_weight.shape[1] ** -0.5)
            init.normal_(self.score_weight, 0.0, self.score_weight.shape[1] ** -0.5)
            init.zeros_(self.context_bias)
            init.zeros_(self.score_bias)

    @property
    def kept(self) -> int:
        """The number of neuron groups that are on (multiplied) for each token now."""
        return self.in_force(self.schedule)

    @property
    def share_on(self) -> Fraction:
        """The share of neuron groups that is on (multiplied) once any warm-up is over, of those left after pruning."""
        return Fraction(self.config.kept(self.neurons, self.schedule.final), self.total)

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the share of the MLP's weights that is multiplied, which is the share of its groups that is on.

        All three matrices are multiplied only for the groups that are on. share: the share of groups, from 0 to 1, as a
        fraction or a tensor with one value per token; it is returned unchanged. single_token: not used.
        """
        return share

    def forward(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None) -> GroupChoice:
        """Return the K groups that are on for each token, the factors on their outputs, and a record of the decision.

        The result has `group_BTK` (int64, ascending indices), `gain_BTK` (fp32) and `record`. x_BTD: the MLP's input
        [B, T, D], padding included. tokens: the tokens' positions and documents. cache: the layer's KV cache, which
        also stores the sums over earlier tokens of the input's projections, from which the router computes its scores;
        None means no earlier tokens.
        """
        score_BTG = self._scores(x_BTD, tokens, cache) if self.learns else self._random(x_BTD, tokens)
        ranked_BTG = score_BTG if self.balance_bias is None else score_BTG + self.balance_bias
        group_BTK = ranked_BTG.topk(self.kept, dim=-1, sorted=False).indices.sort(-1).values
        gain_BTK = torch.ones_like(group_BTK, dtype=score_BTG.dtype)
        if self.learns:
            gain_BTK = 2 * score_BTG.gather(-1, group_BTK).sigmoid()
        return GroupChoice(group_BTK, gain_BTK, self._record(score_BTG, group_BTK, tokens))

    def _record(self, score_BTG: Tensor, group_BTK: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        reached_BT, seen_BTG = real_mask(tokens, score_BTG[..., 0]), score_BTG.detach()
        kept_BTG = torch.zeros_like(score_BTG, dtype=torch.bool).scatter(-1, group_BTK, True)
        if tokens.real_BT is not None:
            kept_BTG = kept_BTG & reached_BT[..., None]
            seen_BTG = seen_BTG.masked_fill(~reached_BT[..., None], float("nan"))
        return NeuronGroupsRecord(seen_BTG, kept_BTG, reached_BT, kept_BTG)

    def _scores(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None) -> Tensor:
        z_BTR = score_linear(x_BTD, self.context_weight)
        memory = Memory(tokens, cache, self.placement.name)
        start_BTR = chunk_start(z_BTR, tokens, memory, self.config.chunk_size, self.config.decay)
        return score_linear((start_BTR + ops.wide(self.context_bias)).relu(), self.score_weight, self.score_bias)

    def _random(self, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return pseudo-random scores of each chunk and group, for the control."""
        chunk_BT = (tokens.position_BT // self.config.chunk_size).double()
        group_G = torch.arange(self.total, device=x_BTD.device) * 4.1414 + self.placement.layer * 78.233
        turned_BTG = torch.sin(chunk_BT[..., None] * 12.9898 + group_G) * 43758.5453
        return (turned_BTG - turned_BTG.floor()).to(ops.wide_dtype(x_BTD)).expand(*x_BTD.shape[:2], -1)

    def share(self, record: NeuronGroupsRecord) -> Tensor:
        """Return the share of the tokens in `record` for which each of G groups is on, fp32 [G]; NaN without tokens.

        record: the router's decisions in a forward pass; tokens that did not reach the MLP do not count.
        """
        return record.kept_BTG.sum((0, 1)) / record.reached_BT.sum()

    def statistics(self, record: Record) -> Tensor | None:
        """Return the share of tokens for which each of G groups is on, [G], for updating the balancing bias.

        The bias, added to scores when groups are ranked, is updated in `advance`. None if `balance_rate` is 0, because
        there is no bias then. record: the router's decisions in one micro-batch.
        """
        record = expect(record, NeuronGroupsRecord)
        return self.share(record) if self.config.balance_rate else None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        super().advance(progress, statistics)
        if self.balance_bias is not None and statistics is not None:
            self.balance_bias += self.config.balance_rate * (statistics.mean() - statistics).sign()

    def set_identity(self) -> None:
        """Keep every group of neurons on from now on, with the factor 1 on its output."""
        super().set_identity()
        if self.learns:
            with torch.no_grad():
                self.score_weight.zero_()
                self.score_bias.zero_()

    def flops(self, tokens: float, routing: str) -> float:
        return 2 * tokens * (self.context_weight.numel() + self.score_weight.numel()) if self.learns else 0

    def cache_bytes(self, tokens: float) -> float:
        """Return how many bytes the router caches for a row of `tokens` tokens.

        For each token it stores running sums of the projected inputs and the context of the token's chunk, 2 R + 2 fp32
        numbers for the router's hidden width R, and the token's index, int64. A random control stores nothing.
        """
        return tokens * (4 * (2 * self.config.router_width + 2) + 8) if self.learns else 0
