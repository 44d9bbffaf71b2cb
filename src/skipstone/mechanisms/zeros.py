"""Neurons at zero: a neuron whose activation is exactly 0 is not multiplied any further. Nothing is lost or learned.

    a      = act(W_gate x)                    with ReLU, about half of them are 0 at the start of a training
    on     = the neurons with a != 0
    y      = W_down[on] ( a[on] * W_up[on] x )

The output is that of the MLP without this part, because what is left out would be multiplied by 0. It saves FLOPs and
bytes in calls of one token, where rows of W_up and columns of W_down belong to neurons; the gate matrix is multiplied
in full. How many neurons are on follows from the text, so the cost model knows the share only from a measurement and
takes 1 without one.

A price on |a| in training (`price`) makes zeros more frequent.

ReGLU is from arXiv 2002.05202; that large models with ReLU have mostly zeros, and decode faster for it, from arXiv
2310.04564.

Shape letters: B rows, T tokens, F neurons.
"""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

import torch
from torch import Tensor

from skipstone.core.records import NeuronGroupsRecord
from skipstone.core.routing_module import Placement
from skipstone.core.strict import parsed
from skipstone.core.tokens import Tokens
from skipstone.core.width import ActivationGroupRouter, Share
from skipstone.mechanisms.grouping import NAME, NeuronChoiceConfig, empty_groups, group_record, share_of_one_token


@dataclass(frozen=True, kw_only=True)
class ZeroNeuronsConfig(NeuronChoiceConfig):
    """The options of neurons at zero.

    price: coefficient of the auxiliary loss |a|, a mean over the neurons, which turns neurons off during training.
    decision: distinguishes these options from those of neuron groups.
    """

    price: float = 0.0
    decision: Literal["zeros"] = "zeros"

    def __post_init__(self) -> None:
        if not self.price >= 0:
            raise ValueError(f"price must not be negative, got {self.price}")


class ZeroNeurons(ActivationGroupRouter):
    """Choose for each token the neurons whose activation is not 0; `nn/magnitude_mlp.py` executes it."""

    Config: ClassVar[type[ZeroNeuronsConfig]] = ZeroNeuronsConfig

    def __init__(
        self,
        hidden_size: int,
        neurons: int,
        placement: Placement | None = None,
        config: ZeroNeuronsConfig | None = None,
        **options: object,
    ) -> None:
        """Build the router. neurons: of the MLP. `options` are parsed unless `config` is given."""
        super().__init__()
        self.config = parsed(ZeroNeuronsConfig, config, options)
        self.placement, self.total = placement or Placement(name=NAME), neurons
        self.register_buffer("typical_F", torch.ones(neurons), persistent=False)

    @property
    def group_size(self) -> int:
        """1: every neuron is a group of its own."""
        return 1

    @property
    def tried(self) -> int:
        """The number of neurons for which the second matrix is multiplied at most: all of them."""
        return self.total

    @property
    def kept(self) -> int:
        """The largest number of neurons that can be on for a token: all of them."""
        return self.total

    @property
    def share_on(self) -> Fraction:
        """The share of the neurons that is on at most, 1."""
        return Fraction(1)

    def counts(self, a_BTF: Tensor) -> tuple[int, int]:
        """Return twice the number of neurons that are on for one token. The host waits."""
        on = int(a_BTF.count_nonzero())
        return on, on

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.config.price > 0

    def price(self, a_BTF: Tensor) -> Tensor | None:
        """Return the mean of |a| over the neurons times its coefficient, fp32 [B, T]; None if that is 0."""
        return a_BTF.float().abs().mean(-1) * self.config.price if self.config.price else None

    def in_words(self) -> str:
        return "neurons at exactly 0 left out"

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the multiplied share of the three matrices, which is 1 but in calls of one token."""
        return share_of_one_token(share, single_token)

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the magnitudes of the activations, fp32 [B, T, F], and whether they are not 0, bool."""
        return a_BTF.detach().float().abs(), a_BTF != 0

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """Return which products are not 0, bool [B, T, F]."""
        return h_BTF != 0

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        return group_record(score_BTG, tried_BTG, kept_BTG, tokens)

    def empty_record(self, x_BTD: Tensor) -> NeuronGroupsRecord:
        return empty_groups(x_BTD, self.total)

    def set_identity(self) -> None:
        """Do nothing, because the output is that of the MLP alone."""

    def flops(self, tokens: float, routing: str) -> float:
        """Return 0, because comparisons are not matrix products."""
        return 0
