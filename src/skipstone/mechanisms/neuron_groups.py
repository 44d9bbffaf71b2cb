"""Neuron groups: some groups of an MLP's neurons are off for a chunk of tokens, and then not multiplied at all.

    c      = exponential mean of W_c x over the document's tokens up to the first one of the chunk
    score  = W_s relu(c + b_c) + b_s              one number for each group of `group_size` neurons
    kept   = the floor(capacity G) groups with the highest score (plus their balance, if any)
    y      = W_down[kept] ( gain * act(W_gate[kept] x) * W_up[kept] x ),    gain = 2 sigmoid(score)

The best groups of a chunk are taken, not the best tokens of a row, so the share is exact and no token sees a later one:
training decides and computes as generation does. The router learns from the gain of the groups that it keeps. The chunk
exists for decoding: while it lasts, the same part of the weights is read in every step.

`decision: magnitude` does without a router: `magnitude.py`.

All is ours. Related: a prompt's neurons serve what follows it (GRIFFIN, arXiv 2404.01365, training-free);
mixtures of many small experts, of which this is one with a decision for a chunk and the storage of a dense MLP.
Balancing without a loss is that of arXiv 2408.15664: a bias that only choosing sees, moved by u sign(mean - share of
tokens) a step.

Shape letters: B rows, T tokens, D width, R projected width, G groups, K kept groups.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from transformers import initialization as init

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.records import NeuronGroupsRecord, Record
from skipstone.core.routing_module import Placement, RoutingModule
from skipstone.core.strict import from_dict
from skipstone.core.tokens import Tokens, real_mask
from skipstone.mechanisms.contexts import Memory, chunk_start
from skipstone.mechanisms.neuron_options import NeuronGroupsConfig
from skipstone.mechanisms.schedules import Capacity
from skipstone.ops import score_linear

NAME = "neuron_groups"


class Choice(NamedTuple):
    """group_BTK: int64, the groups that are on, ascending. gain_BTK: fp32 factor on what each of them computes."""

    group_BTK: Tensor
    gain_BTK: Tensor
    record: NeuronGroupsRecord


class NeuronGroups(RoutingModule):
    """Decides which groups are on; the MLP executes it. `neurons`: of the MLP before pruning."""

    Config: ClassVar[type[Any]] = NeuronGroupsConfig

    def __init__(self, hidden_size: int, neurons: int, placement: Placement | None = None, **options: Any) -> None:
        super().__init__()
        self.config: NeuronGroupsConfig = from_dict(NeuronGroupsConfig, options)
        self.placement, self.neurons = placement or Placement(name=NAME), neurons
        self.total = self.config.neurons(self.placement.layer, neurons) // self.config.group_size
        self.schedule = Capacity(self.config.capacity, self.config.capacity_warmup)
        self.balance_bias: Tensor | None
        self.register_buffer("balance_bias", torch.zeros(self.total) if self.config.balance_rate else None)
        self.learns = self.config.decision == "learned"
        self._build(hidden_size)
        self.reset_parameters()

    def _build(self, hidden_size: int) -> None:
        if self.learns:
            R = self.config.router_width
            self.context_weight = nn.Parameter(torch.empty(R, hidden_size))
            self.context_bias = nn.Parameter(torch.empty(R))
            self.score_weight = nn.Parameter(torch.empty(self.total, R))
            self.score_bias = nn.Parameter(torch.empty(self.total))

    def reset_parameters(self) -> None:
        if self.balance_bias is not None:
            init.zeros_(self.balance_bias)
        if self.learns:
            init.normal_(self.context_weight, 0.0, self.context_weight.shape[1] ** -0.5)
            init.normal_(self.score_weight, 0.0, self.score_weight.shape[1] ** -0.5)
            init.zeros_(self.context_bias)
            init.zeros_(self.score_bias)

    @property
    def kept(self) -> int:
        """K in force."""
        return self._in_force(self.schedule)

    def _in_force(self, schedule: Capacity) -> int:
        """Groups, which after pruning may be fewer than a warm-up would keep."""
        return min(self.config.kept(self.neurons, schedule.now), self.total)

    @property
    def share_on(self) -> Fraction:
        """K / G once a warm-up is over."""
        return Fraction(self.config.kept(self.neurons, self.schedule.final), self.total)

    def multiplied(self, share: Any, single_token: bool) -> Any:
        """Of the MLP's matrices, for a share of groups that is on; single_token: in a call of one token."""
        return share

    def forward(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None) -> Choice:
        """x_BTD: the MLP's input, not unpadded."""
        score_BTG = self._scores(x_BTD, tokens, cache) if self.learns else self._random(x_BTD, tokens)
        ranked_BTG = score_BTG if self.balance_bias is None else score_BTG + self.balance_bias
        group_BTK = ranked_BTG.topk(self.kept, dim=-1, sorted=False).indices.sort(-1).values
        gain_BTK = 2 * score_BTG.gather(-1, group_BTK).sigmoid() if self.learns else torch.ones_like(group_BTK).float()
        return Choice(group_BTK, gain_BTK, self._record(score_BTG, group_BTK, tokens))

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
        return score_linear((start_BTR + self.context_bias.float()).relu(), self.score_weight, self.score_bias)

    def _random(self, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Control: the fractional part of a large sine of chunk of positions, group and layer."""
        chunk_BT = (tokens.position_BT // self.config.chunk_size).double()
        group_G = torch.arange(self.total, device=x_BTD.device) * 4.1414 + self.placement.layer * 78.233
        turned_BTG = torch.sin(chunk_BT[..., None] * 12.9898 + group_G) * 43758.5453
        return (turned_BTG - turned_BTG.floor()).float().expand(*x_BTD.shape[:2], -1)

    def share(self, record: NeuronGroupsRecord) -> Tensor:
        """Share of the tokens for which each group is on, fp32 [G]; NaN where nobody was asked."""
        return record.kept_BTG.sum((0, 1)) / record.reached_BT.sum()

    def statistics(self, record: Record) -> Tensor | None:
        assert isinstance(record, NeuronGroupsRecord)
        return self.share(record) if self.config.balance_rate else None

    def advance(self, progress: float, statistics: Tensor | None) -> None:
        self.schedule.advance(progress)
        if self.balance_bias is not None and statistics is not None:
            self.balance_bias += self.config.balance_rate * (statistics.mean() - statistics).sign()

    def empty_record(self, x_BTD: Tensor) -> NeuronGroupsRecord:
        nan_BTG = x_BTD.new_full((*x_BTD.shape[:2], self.total), float("nan"), dtype=torch.float32)
        none_BTG = nan_BTG > 0
        return NeuronGroupsRecord(nan_BTG, none_BTG, x_BTD.new_zeros(x_BTD.shape[:2], dtype=torch.bool), none_BTG)

    def not_ready_reason(self) -> str | None:
        return self.schedule.not_ready_reason()

    def set_identity(self) -> None:
        """Every group on, with a gain of 1."""
        self.schedule.pin(1.0)
        if self.learns:
            with torch.no_grad():
                self.score_weight.zero_()
                self.score_bias.zero_()

    def flops(self, tokens: float, routing: str) -> float:
        return 2 * tokens * (self.context_weight.numel() + self.score_weight.numel()) if self.learns else 0

    def cache_bytes(self, tokens: float) -> float:
        """fp32 sums and their count, tokens counted, the chunk's start; and the int64 slot."""
        return tokens * (4 * (2 * self.config.router_width + 2) + 8) if self.learns else 0
