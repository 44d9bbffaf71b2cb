"""A gated MLP that multiplies only the groups of neurons that are on.

Two executors give the same result. The masked one multiplies all neurons and sets those that are off to 0. The gathered
one takes each run of consecutive tokens with equal groups and multiplies it by the weights of these groups only.
Decoding steps keep a copy of these weights in the cache.

Shape letters: B rows, T tokens, N tokens as they come (with or without padding), D width, F neurons, J neurons that are
on, K groups that are on, S neurons of a group.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.counts import Amount, number
from skipstone.core.records import NeuronGroupsRecord, Records, find
from skipstone.core.routing_module import RoutingModule
from skipstone.core.tokens import Tokens
from skipstone.core.weights import is_quantised, weight_is_readable, weight_marks, weights_multiplied
from skipstone.core.width import Activation, FeedForward, GroupChoice, GroupRouter, InputGroupRouter, Share
from skipstone.nn.linear import OutputLinear
from skipstone.nn.mlp import activated
from skipstone.ops.neurons import Runs, kept_linear, kept_part
from skipstone.ops.reference import dropped

Part: TypeAlias = tuple[Tensor, ...]  # gate, up and down weights of the groups that are on in one row


@dataclass(frozen=True)
class Held:
    """Copied weights that decoding steps reuse while the neurons that are on in each row stay the same.

    group_BK: int64, the K groups that are on in each of B rows. parts: for each row, the gate, up and down weights of
    these groups. marks: counters (`weight_marks`) by which a later change of the MLP's weights is noticed.
    """

    group_BK: Tensor
    parts: list[Part]
    marks: list[int]


class DivisibleMLP(FeedForward):
    """The base class of gated MLPs whose neurons are divided into groups that are switched on or off for each token.

    width: width of the residual stream. neurons: number of neurons in the MLP. activation: activation applied to the
    gates. router: the module that chooses the groups that are on. dropout: dropout probability for the output.
    Subclasses define how the groups that are on are computed.
    """

    def __init__(
        self, width: int, neurons: int, activation: Activation, router: GroupRouter, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, neurons, bias=False)
        self.up_proj = nn.Linear(width, neurons, bias=False)
        self.down_proj = OutputLinear(neurons, width, bias=False)
        self.activation = activation
        self.router = router
        self.dropout = dropout

    @property
    def total(self) -> int:
        """The number of neuron groups."""
        return self.router.total

    @property
    def divisible(self) -> bool:
        """Whether slices of the weight matrices can be multiplied directly, without calling the linear layers."""
        return all(map(weight_is_readable, self.matrices()))

    def matrices(self) -> tuple[nn.Linear, nn.Linear, nn.Linear]:
        """Return the linear layers gate, up and down."""
        return self.gate_proj, self.up_proj, self.down_proj

    def routing_modules(self) -> dict[str, RoutingModule]:
        return {**super().routing_modules(), self.router.placement.name: self.router}

    def in_words(self) -> str:
        return self.router.in_words()

    def weights_per_pass(self) -> int:
        return sum(map(weights_multiplied, self.matrices()))

    def passes(self, tokens: float, kept: Mapping[str, Amount], single_token: bool = False) -> Fraction:
        """Return the work of `tokens` tokens in this MLP, in multiples of one token's work in the whole MLP.

        kept: the shares of neuron groups that were on in a measured forward pass, by name of the routing module;
        without an entry of this MLP, the configured share is used. single_token: whether it is a call of one token
        without gradients, in which some MLPs can multiply fewer weights.
        """
        share = Fraction(number(kept.get(self.router.placement.name, self.router.share_on)))
        return Fraction(tokens) * self._matrix_share(share, single_token)

    def measured(self, records: Records) -> dict[str, Fraction]:
        """Return {name: share of neuron groups that were on in a pass}, as the method `passes` takes it.

        name: the one under which the router's decisions are returned. The share is a mean over the tokens that reached
        the MLP; the dict is empty if none did. Where more groups are tried (multiplied by the up projection) than kept
        (by the down projection), it is the mean of both shares. records: the decisions recorded in the pass, by name.
        """
        name = self.router.placement.name
        record = find(records, name, NeuronGroupsRecord)
        if record is None or not record.reached_BT.any():
            return {}
        on = int(record.kept_BTG.sum()) + int(record.tried_BTG.sum())
        return {name: Fraction(on, 2 * int(record.reached_BT.sum()) * record.kept_BTG.shape[-1])}

    def token_passes(self, records: Records) -> Tensor:
        record = find(records, self.router.placement.name, NeuronGroupsRecord)
        if record is None:
            return torch.ones(1, 1)
        tried_BT, kept_BT = (on_BTG.double().mean(-1).cpu() for on_BTG in (record.tried_BTG, record.kept_BTG))
        return self._matrix_share((tried_BT + kept_BT) / 2, kept_BT.shape == (1, 1)).float()

    def _matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the share of the three matrices' weights that is multiplied if the share `share` of groups is on.

        single_token is as in `passes`.
        """
        return self.router.matrix_share(share, single_token) if self.divisible else 1 + 0 * share


class GroupedMLP(DivisibleMLP):
    """A gated MLP whose router chooses for each token, from the MLP's input, the groups of neurons to compute.

    width: width of the residual stream. neurons: number of neurons in the MLP. activation: activation applied to the
    gates. router: the module that chooses the groups. dropout: dropout probability for the output.
    """

    router: InputGroupRouter

    def __init__(
        self, width: int, neurons: int, activation: Activation, router: InputGroupRouter, dropout: float = 0.0
    ) -> None:
        super().__init__(width, neurons, activation, router, dropout)

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        choice: GroupChoice = self.router(tokens.pad(x_BTD), tokens, cache)
        everything = choice.group_BTK.shape[-1] == self.total or not self.divisible
        if everything or tokens.mode.executor == "masked" or torch.compiler.is_compiling():
            y_BTD, records = self._masked(x_BTD, choice, tokens, cache)
        elif cache is not None and x_BTD.shape[1] == 1 and tokens.unpadding is None and not torch.is_grad_enabled():
            y_BTD, records = self._decoded(x_BTD, choice, tokens, cache)
        else:
            y_BTD, records = self._gathered(x_BTD, choice, tokens, cache)
        return dropped(y_BTD, self.dropout, self.training), {**records, self.router.placement.name: choice.record}

    def _masked(
        self, x_BTD: Tensor, choice: GroupChoice, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Records]:
        """Return the output, shaped as x_BTD, and the activation's records; neurons that are off are set to 0.

        choice: the groups that are on for each token.
        """
        gate_BTF = self.gate_proj(x_BTD)
        y_BTF, records = activated(self.activation, gate_BTF, x_BTD, tokens, cache)
        y_BTF = y_BTF * self.up_proj(x_BTD)
        gain_BTG = torch.zeros_like(choice.record.score_BTG).scatter(-1, choice.group_BTK, choice.gain_BTK)
        return self.down_proj(_by_group(y_BTF, tokens.unpad(gain_BTG))), records

    def _gathered(
        self, x_BTD: Tensor, choice: GroupChoice, tokens: Tokens, cache: SkipstoneCacheLayer | None
    ) -> tuple[Tensor, Records]:
        """Return the output, shaped as x_BTD, and the activation's records; only groups that are on are multiplied.

        Consecutive tokens with equal groups share a product. choice: the groups that are on for each token.
        """
        group_BTK = choice.group_BTK
        begins_BT = torch.ones(group_BTK.shape[:2], dtype=torch.bool, device=group_BTK.device)
        begins_BT[:, 1:] = (group_BTK[:, 1:] != group_BTK[:, :-1]).any(-1)
        begins_N, size = tokens.unpad(begins_BT).flatten(), self.gate_proj.out_features // self.total
        runs = Runs.of(tokens.unpad(group_BTK).flatten(0, 1), begins_N, self.total, size)
        x_ND, shape = x_BTD.flatten(0, 1), (*x_BTD.shape[:2], -1)
        gate_BTJ = kept_linear(x_ND, whole_weight(self.gate_proj), runs, 0).view(shape)
        up_BTJ = kept_linear(x_ND, whole_weight(self.up_proj), runs, 0).view(shape)
        y_BTJ, records = self.activation(gate_BTJ, tokens.pad(x_BTD), tokens, cache, runs)
        y_BTJ = _by_group(y_BTJ * up_BTJ, tokens.unpad(choice.gain_BTK))
        return kept_linear(y_BTJ.flatten(0, 1), whole_weight(self.down_proj), runs, 1).view(x_BTD.shape), records

    def _decoded(
        self, x_B1D: Tensor, choice: GroupChoice, tokens: Tokens, cache: SkipstoneCacheLayer
    ) -> tuple[Tensor, Records]:
        """Return the output of a decoding step, [B, 1, D], and the activation's records.

        The weights of a row's groups were copied in an earlier step if the groups are the same. choice: the groups that
        are on.
        """
        held = self._held(choice.group_BTK[:, 0], cache)
        runs = Runs(group_MK=held.group_BK, bounds=list(range(len(x_B1D) + 1)), blocks=[], total=self.total)
        gate_B1J, up_B1J = _by_row(x_B1D, held, 0), _by_row(x_B1D, held, 1)
        y_B1J, records = self.activation(gate_B1J, x_B1D, tokens, cache, runs)
        return _by_row(_by_group(y_B1J * up_B1J, choice.gain_BTK), held, 2), records

    def _held(self, group_BK: Tensor, cache: SkipstoneCacheLayer) -> Held:
        """Return the weights of each row's groups, copied from the matrices only for rows whose groups have changed.

        group_BK: int64, the groups of each row. cache: where copies are kept. The CPU waits for the device.
        """
        name, before = self.router.placement.name, cache.scratch.get(self.router.placement.name)
        parts: dict[int, Part] = {}
        marks = weight_marks(*self.matrices())
        if isinstance(before, Held) and before.marks == marks and before.group_BK.shape == group_BK.shape:
            if torch.equal(before.group_BK, group_BK):
                return before
            same_B = (before.group_BK == group_BK).all(-1).tolist()
            parts = {row: part for row, part in enumerate(before.parts) if same_B[row]}
        all_parts = [parts.get(row) or self._part(group_K) for row, group_K in enumerate(group_BK)]
        held = cache.scratch[name] = Held(group_BK, all_parts, marks)
        return held

    def _part(self, group_K: Tensor) -> Part:
        """Return copies of the gate, up and down weights of the groups `group_K`."""
        linears = ((self.gate_proj, 0), (self.up_proj, 0), (self.down_proj, 1))
        return tuple(kept_part(whole_weight(linear), group_K, self.total, axis) for linear, axis in linears)


def whole_weight(linear: nn.Linear) -> Tensor:
    """Return the weight of a linear layer, dequantised if torchao has quantised it, because it cannot be sliced."""
    return linear.weight.dequantize() if is_quantised(linear) else linear.weight


def _by_group(y: Tensor, gain: Tensor) -> Tensor:
    """Return y [..., K S] times gain [..., K], of which each entry scales the S neurons of one group."""
    return (y.unflatten(-1, (gain.shape[-1], -1)) * gain[..., None].to(y.dtype)).flatten(-2)


def _by_row(x_B1I: Tensor, held: Held, which: int) -> Tensor:
    """Return the product of each row with its own weights, [B, 1, O].

    x_B1I: the inputs. held: the weights of each row. which: 0 for gate, 1 for up, 2 for down.
    """
    if len(x_B1I) == 1:
        return F.linear(x_B1I, held.parts[0][which])
    return torch.stack([F.linear(x, parts[which]) for x, parts in zip(x_B1I, held.parts, strict=True)])
