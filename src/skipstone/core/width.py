"""The seam on the width side: what a block asks of its MLP, and an MLP of its activation and of what chooses neurons.

Depth mechanisms wrap updates (`core/seam.py`); what saves inside an MLP sits in it. Each part here says which routing
modules it holds, what they recorded, and how often a token passes the MLP's matrices, so that block, cost model and
generation ask and never look for attributes.

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
from skipstone.core.tokens import Tokens
from skipstone.ops.neurons import Runs

Share = TypeVar("Share", Fraction, Tensor)


class Activation(nn.Module):
    """The activation slot of an MLP.

    by_token: whether a token's result depends on that token alone, so that unpadded tokens may be given as they are.
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
        """The activated pre-activations, shaped as they are, and what was decided.

        gate_BTF: pre-activations of all neurons. runs: where only some groups of neurons are on, which these are;
        gate_BTF then holds the neurons that are on, and x_BTD is padded all the same.
        """
        raise NotImplementedError

    def routing_modules(self) -> dict[str, RoutingModule]:
        """What decides in it, by the name of its record; empty for a fixed function."""
        return {}


class GroupRouter(RoutingModule):
    """Says which groups of an MLP's neurons are on. The two kinds below say it at different moments."""

    total: int  # G

    @property
    def share_on(self) -> Fraction:
        """Share of the groups that is on once a warm-up is over."""
        raise NotImplementedError

    def in_words(self) -> str:
        """How many groups are on, for a model card, as in `12 of 20 neuron groups on`."""
        raise NotImplementedError

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Share of the MLP's three matrices that is multiplied, for a share of groups that is on.

        single_token: in a call of one token without gradients.
        """
        raise NotImplementedError


class GroupChoice(NamedTuple):
    """group_BTK: int64, the groups that are on, ascending. gain_BTK: fp32 factor on what each of them computes."""

    group_BTK: Tensor
    gain_BTK: Tensor
    record: NeuronGroupsRecord


class InputGroupRouter(GroupRouter):
    """Chooses from the MLP's input, before any of its matrices is multiplied."""

    def forward(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None) -> GroupChoice:
        """The groups that are on for each token; x_BTD: the MLP's input, padded."""
        raise NotImplementedError


class ActivationGroupRouter(GroupRouter):
    """Chooses from what the MLP itself computes, matrix by matrix; it has no forward pass of its own.

    typical_F: fp32 root mean square of what the second matrix gives, neuron by neuron.
    """

    typical_F: Tensor

    @property
    def tried(self) -> int:
        """Groups that the second matrix is multiplied for, in force."""
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """Groups that go through the last matrix, in force: at most `tried`."""
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        """Neurons of a group."""
        raise NotImplementedError

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Scores, fp32 [B, T, G], and which groups are tried, bool; a_BTF: activations of all neurons."""
        raise NotImplementedError

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """bool [B, T, G], the groups that are kept; h_BTF: products of those that are tried, else 0."""
        raise NotImplementedError

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        """What was decided, with NaN and False for padding."""
        raise NotImplementedError


class FeedForward(nn.Module):
    """The MLP of a block."""

    activation: Activation

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        """The MLP's update, shaped as x_BTD (unpadded tokens stay unpadded), and what was decided in it."""
        raise NotImplementedError

    def routing_modules(self) -> dict[str, RoutingModule]:
        """What decides in it, by the name of its record, the MLP itself included if it does."""
        return self.activation.routing_modules()

    def in_words(self) -> str | None:
        """What it computes of itself, for a model card, as in `8 experts of 176 neurons (silu), top 2`; None: all."""
        return None

    def weights_per_pass(self) -> int:
        """Number of weights that a token is multiplied with in one pass: of all matrices, or of one expert's."""
        raise NotImplementedError

    def dense_passes(self, tokens: float) -> float:
        """Passes of so many tokens with every neuron on and no choice spent on a no-op."""
        return tokens

    def passes(self, tokens: float, kept: Mapping[str, Amount], single_token: bool = False) -> float | Fraction:
        """Passes of so many tokens, by what was measured (`kept`, see `measured`), else as the configuration promises.

        single_token: in a call of one token without gradients.
        """
        return tokens

    def measured(self, records: Records) -> dict[str, Fraction]:
        """What `passes` wants to know of a forward pass, by name: from the records that this MLP made in it."""
        return {}

    def token_passes(self, records: Records) -> Tensor:
        """Passes of each token whose update was computed, fp32 [B, T] on the CPU, or [1, 1] where all are alike."""
        return torch.ones(1, 1)

    def inactive_weights(self) -> int:
        """Number of weights that a token does not pass although it may choose them: other experts'."""
        return 0
