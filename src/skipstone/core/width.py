"""The interface of MLPs, as blocks use it, and of the activations and neuron-group routers inside an MLP.

Depth mechanisms wrap updates (`core/seam.py`); mechanisms that save inside an MLP are parts of it. Each part reports
its routing modules, their decisions, and how often a token passes the MLP's matrices, for block, cost model and
generation.

Shape letters: B rows, T tokens, N tokens as they come (with or without padding), D width, F neurons, G groups of
neurons, K groups that are on.
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
from skipstone.core.stream_gate import NeuronChoice, StreamMix
from skipstone.core.tokens import Tokens
from skipstone.ops.neurons import Runs

Share = TypeVar("Share", Fraction, Tensor)


class Activation(nn.Module):
    """The interface of an MLP's activation.

    by_token: whether a token's result depends on that token alone, so that the MLP may pass the real tokens of all rows
    concatenated, [1, N, F], instead of padded rows.
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
        """Return the activations, shaped as `gate_BTF`, and the records of the decisions made, by name.

        gate_BTF: pre-activations of the MLP's F neurons. x_BTD: the MLP's input. tokens: the tokens of this call.
        cache: the block's cache in generation, for state of earlier tokens; None means no cache. runs: the runs of
        consecutive tokens with the same neuron groups on (`ops/neurons.py`); None means that all neurons are on. If
        given, the last axis of gate_BTF has, for each token, the neurons of its own groups alone, in their order; their
        number is the same for all tokens. gate_BTF then leaves out padding, [1, N, ...], if `tokens.unpadding` is set,
        but x_BTD still has the padded form [B, T, D].
        """
        raise NotImplementedError

    def routing_modules(self) -> dict[str, RoutingModule]:
        """Return the modules of this activation that make decisions, by name; empty for a fixed function.

        The names are those under which forward returns the decisions.
        """
        return {}

    def stream_mix(self) -> StreamMix | None:
        """Return a description of what the activation computes in generation, for decoding by compiled code.

        A step that runs all blocks in one numba call computes the activation by it. Return None if it cannot be
        described so; the activation is then called instead.
        """
        return None


class GroupRouter(RoutingModule):
    """The base class of routers that choose for each token which groups of an MLP's neurons are on (computed).

    A subclass chooses either before any matrix is multiplied, or between the matrices. total: the number of groups.
    """

    total: int  # G

    @property
    def share_on(self) -> Fraction:
        """The share of groups that are on after any warm-up, an exact fraction from 0 to 1."""
        raise NotImplementedError

    def in_words(self) -> str:
        """Return how many groups are on, in words for a model card: `12 of 20 neuron groups on`."""
        raise NotImplementedError

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the share of the MLP's three matrices that is multiplied if the share `share` of its groups is on.

        The result is a share of the matrices' weights. share: a share from 0 to 1, as a fraction or a tensor with one
        value per token; the result has the same type. single_token: whether the call has one token and needs no
        gradients, so that matrices can be read in part.
        """
        raise NotImplementedError


class GroupChoice(NamedTuple):
    """The K groups of an MLP's neurons that are computed for each token.

    group_BTK: int64, indices of the groups, ascending. gain_BTK: fp32, factor on the output of each of these groups.
    record: the decisions, for the caller of the model.
    """

    group_BTK: Tensor
    gain_BTK: Tensor
    record: NeuronGroupsRecord


class InputGroupRouter(GroupRouter):
    """A router that chooses neuron groups from the MLP's input, before any of its matrices is multiplied."""

    def forward(self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None) -> GroupChoice:
        """Return the groups that are on for each token, the factors on their outputs, and a record of the decision.

        x_BTD: the MLP's input, with padding. tokens: the tokens of this call. cache: the block's cache in generation;
        None means no cache.
        """
        raise NotImplementedError


class ActivationGroupRouter(GroupRouter):
    """A router that chooses neuron groups from the MLP's own intermediate results.

    The router has no forward; the MLP calls its methods between its matrices. Groups are tried (multiplied by the up
    projection) if their activations promise enough, and kept (multiplied by the down projection) if the products of
    activation and up projection do. typical_F: fp32, root mean square of the up projection's output for each of F
    neurons.
    """

    typical_F: Tensor

    @property
    def tried(self) -> int:
        """The number of neuron groups that the up projection currently multiplies, per token.

        If tokens differ, it is the largest number of any token. It may change during training.
        """
        raise NotImplementedError

    @property
    def kept(self) -> int:
        """The number of groups per token that the down projection (last matrix) currently multiplies."""
        raise NotImplementedError

    @property
    def group_size(self) -> int:
        """The number of neurons per group."""
        raise NotImplementedError

    def counts(self, a_BTF: Tensor) -> tuple[int, int]:
        """Return how many groups the up projection multiplies (tried), and how many the down projection (kept).

        a_BTF: activations of the one token of a call, from which routers without fixed numbers count the groups.
        """
        return self.tried, self.kept

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the groups' scores, fp32 [B, T, G], and which groups to multiply by the up projection, bool [B, T, G].

        a_BTF: activations of all neurons (the gate projection's output after the activation function).
        """
        raise NotImplementedError

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """Return which groups to multiply by the down projection, bool [B, T, G].

        h_BTF: activations times the up projection's output; 0 for groups for which the latter was not computed.
        """
        raise NotImplementedError

    def price(self, a_BTF: Tensor) -> Tensor | None:
        """Return the auxiliary loss of each token, fp32 [B, T]; None if the router has none.

        a_BTF: activations of all neurons (the gate projection's output after the activation function).
        """
        return None

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        """Return the record of a call's decisions, with NaN scores and False masks for padding.

        score_BTG: the groups' scores, fp32. tried_BTG, kept_BTG: bool, the groups multiplied by the up and by the down
        projection. tokens: the tokens of the call.
        """
        raise NotImplementedError

    def stream_choice(self) -> NeuronChoice | None:
        """Return a description of how the router currently chooses neurons, for decoding by compiled code.

        A step that runs all blocks in one numba call chooses by it. Return None if it cannot be described so; the MLP
        is then called as usual.
        """
        return None


class FeedForward(nn.Module):
    """The interface of a block's MLP.

    activation: the activation inside it.
    """

    activation: Activation

    def forward(
        self, x_BTD: Tensor, tokens: Tokens, cache: SkipstoneCacheLayer | None = None
    ) -> tuple[Tensor, Records]:
        """Return what the MLP adds to the residual stream, shaped as x_BTD, and the records of its decisions by name.

        x_BTD: the MLP's input, or [1, N, D] without padding if `tokens.unpadding` is set. tokens: the tokens of this
        call. cache: the block's cache in generation; None means no cache.
        """
        raise NotImplementedError

    def routing_modules(self) -> dict[str, RoutingModule]:
        """Return the modules that make decisions in this MLP, by name; the MLP itself may be among them.

        The names are those under which forward returns the decisions.
        """
        return self.activation.routing_modules()

    def in_words(self) -> str | None:
        """Return a description for a model card: `8 experts of 176 neurons (silu), top 2`; None for a dense MLP."""
        return None

    def weights_per_pass(self) -> int:
        """Return the number of weights that a token is multiplied with in one pass through the MLP or an expert."""
        raise NotImplementedError

    def dense_passes(self, tokens: float) -> float:
        """Return how many passes `tokens` tokens would need with every neuron group on and without no-op experts.

        A pass is one token through the MLP's matrices, or through those of one expert; top-2 experts need two per
        token, of which none is saved here by choosing a no-op expert, one that computes nothing.
        """
        return tokens

    def passes(self, tokens: float, kept: Mapping[str, Amount], single_token: bool = False) -> float | Fraction:
        """Return how many passes through the MLP the tokens of one row make, as a number that need not be whole.

        A pass is one token through the MLP's matrices, or through those of one expert. tokens: number of the row's
        tokens that reach the MLP. kept: amounts measured in a forward pass, by name of the routing module, as
        `measured` returns them; without an entry of this MLP, the result follows from the configuration. single_token:
        whether the call has one token and needs no gradients, so that matrices can be read in part.
        """
        return tokens

    def measured(self, records: Records) -> dict[str, Fraction]:
        """Return how much of this MLP a forward pass computed, as a dict by name of the routing module.

        The amount is, for example, the share of neuron groups that were on, or the mean number of chosen experts in a
        row of tokens; the method `passes` takes the dict as `kept`. It is empty for a dense MLP. records: the decisions
        recorded in the forward pass, by name.
        """
        return {}

    def token_passes(self, records: Records) -> Tensor:
        """Return the number of passes of each token through the MLP, [B, T] on the CPU; [1, 1] if all are equal.

        A pass is one token through the MLP's matrices, or through those of one expert; it counts in part if only a
        share of the weights is multiplied. records: the decisions recorded in the forward pass, by name. Tokens whose
        update was not computed have no meaningful value.
        """
        return torch.ones(1, 1)

    def inactive_weights(self) -> int:
        """Return how many weights a token does not use, those of experts that it does not choose; 0 without experts."""
        return 0
