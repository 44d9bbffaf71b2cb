"""The interface of MLPs, as blocks use it, and of the activations and neuron-group routers inside an MLP.

Depth mechanisms wrap updates (`core/seam.py`); mechanisms that save inside an MLP are parts of it. Each part reports
its routing modules, their records, and how often a token passes the MLP's matrices, for block, cost model and
generation.

Shape letters: B rows, T tokens, N tokens as they come (unpadded or not), D width, F neurons, G groups of neurons, K
groups that are on.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.counts import Amount
from skipstone.core.records import NeuronGroupsRecord, Records
from skipstone.core.routing_module import RoutingModule
from skipstone.core.stream_gate import StreamMix
from skipstone.core.tokens import Tokens
from skipstone.ops.neurons import Runs

Share = TypeVar("Share", Fraction, Tensor)


class Activation(nn.Module):
    """The interface of an MLP's activation.

    by_token: whether a token's result depends on that token alone, so that unpadded tokens may be given.
    """

    by_token = False

    def forward(
        self,
        gate_BTF: Tensor,
        x_BTD: Tensor,
        tokens: Tokens,
        cache: SkipstoneCacheLayer | None = None,
        runs: Runs | None = None,
    ) -> tuple[Tensor, Records]:
        """Return the activations, shaped as `gate_BTF`, and the records of its decisions.

        gate_BTF: pre-activations of all neurons. runs: the groups of neurons that are on, if only some are; gate_BTF
        then holds their neurons only, while x_BTD stays padded.
        """
        raise NotImplementedError

    def routing_modules(self) -> dict[str, RoutingModule]:
        """Return its routing modules by record name; empty for a fixed function."""
        return {}

    def stream_mix(self) -> StreamMix | None:
        """Return what the activation computes in a causal pass, for compiled steps; None: they call it as usual."""
        return None


class GroupRouter(RoutingModule):
    """The base class of routers that choose which groups of an MLP's neurons are on.

    The two subclasses choose at different times: before any matrix is multiplied, or between the matrices.
    """

    total: int  # G

    @property
    def share_on(self) -> Fraction:
        """Share of the groups that are on once any warm-up is over."""
        raise NotImplementedError

    def in_words(self) -> str:
        """Return how many groups are on, for a model card, such as `12 of 20 neuron groups on`."""
        raise NotImplementedError

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the share of the MLP's three matrices that is multiplied if a given share of groups is on.

        single_token: in a call of one token without gradients.
        """
        raise NotImplementedError


class GroupChoice(NamedTuple):
    """The neuron groups that each token uses.

    group_BTK: int64, the groups that are on, ascending. gain_BTK: fp32 factor on the output of each of them.
    """

    group_BTK: Tensor
    gain_BTK: Tensor
    record: NeuronGroupsRecord


class InputGroupRouter(GroupRouter):
    """A router that chooses groups from the MLP's input, before any of its matrices is multiplied."""

    def forward(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None) -> GroupChoice:
        """Choose the groups that are on for each token. x_BTD: the MLP's input, padded."""
        raise NotImplementedError


class ActivationGroupRouter(GroupRouter):
    """A router that chooses groups from the MLP's own intermediate results; it has no forward pass of its own.

    typical_F: fp32 root mean square of the second matrix's output, for each neuron.
    """

    typical_F: Tensor

    @property
    def tried(self) -> int:
        """The number of groups for which the second matrix is multiplied at present."""
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """Number of groups that the last matrix is multiplied for at present, at most `tried`."""
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        """The number of neurons per group."""
        raise NotImplementedError

    def counts(self, a_BTF: Tensor) -> tuple[int, int]:
        """Return the numbers of groups that are tried and kept for one token with these activations."""
        return self.tried, self.kept

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores, fp32 [B, T, G], and which groups are tried, bool; a_BTF: activations of all neurons."""
        raise NotImplementedError

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """Return which groups are kept, bool [B, T, G]; h_BTF: products of the tried groups, 0 for the others."""
        raise NotImplementedError

    def price(self, a_BTF: Tensor) -> Tensor | None:
        """Return the auxiliary loss of each token with these activations, fp32 [B, T]; None without one."""
        return None

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        """Return the record of these decisions, with NaN and False for padding."""
        raise NotImplementedError


class FeedForward(nn.Module):
    """The interface of a block's MLP."""

    activation: Activation

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        """Return the MLP's update, shaped as x_BTD (unpadded tokens stay unpadded), and its records."""
        raise NotImplementedError

    def routing_modules(self) -> dict[str, RoutingModule]:
        """Return the routing modules inside by record name, including the MLP itself if it makes decisions."""
        return self.activation.routing_modules()

    def in_words(self) -> str | None:
        """Return a description for a model card, such as `8 experts of 176 neurons (silu), top 2`; None for a dense
        MLP.
        """
        return None

    def weights_per_pass(self) -> int:
        """Return the number of weights that a token is multiplied with in one pass: all matrices, or those of one
        expert.
        """
        raise NotImplementedError

    def dense_passes(self, tokens: float) -> float:
        """Return the passes of `tokens` tokens if every neuron is on and no choice falls on a no-op expert."""
        return tokens

    def passes(self, tokens: float, kept: Mapping[str, Amount], single_token: bool = False) -> float | Fraction:
        """Return the passes of `tokens` tokens through the MLP.

        kept: what was measured, from `measured`; if empty, as the configuration guarantees. single_token: in a call of
        one token without gradients.
        """
        return tokens

    def measured(self, records: Records) -> dict[str, Fraction]:
        """Return the measurements of a forward pass that `passes` uses, from the records that this MLP made in it."""
        return {}

    def token_passes(self, records: Records) -> Tensor:
        """Return the passes of each token whose update was computed, fp32 [B, T] on the CPU, or [1, 1] if all are
        equal.
        """
        return torch.ones(1, 1)

    def inactive_weights(self) -> int:
        """Return the number of weights that a token could choose but does not use: those of other experts."""
        return 0
