"""Neurons at zero: a neuron whose activation is exactly 0 is not multiplied any further, which changes no output.

    a      = act(W_gate x)                    with ReLU, about half of them are 0 at the start of a training
    on     = the neurons with a != 0
    y      = W_down[on] ( a[on] * W_up[on] x )

It saves FLOPs and bytes in calls of one token, where only the rows of W_up and the columns of W_down that belong to
these neurons are read; the gate matrix is multiplied in full. Nothing is learned. How many neurons are on follows from
the text, so the cost model assumes all of them until a pass has been measured.

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
from transformers import initialization as init

from skipstone.core.records import NeuronGroupsRecord
from skipstone.core.routing_module import Placement
from skipstone.core.stream_gate import NeuronChoice
from skipstone.core.strict import parsed
from skipstone.core.tokens import Tokens
from skipstone.core.width import ActivationGroupRouter, Share
from skipstone.mechanisms.grouping import NAME, NeuronChoiceConfig, empty_groups, group_record, share_of_one_token


@dataclass(frozen=True, kw_only=True)
class ZeroNeuronsConfig(NeuronChoiceConfig):
    """The options of leaving out neurons whose activation is exactly 0.

    price: coefficient of an auxiliary loss in training, the mean |activation| over the neurons, which makes zeros more
    frequent; at least 0. decision: always "zeros"; it distinguishes these options from those of neuron groups. Raises
    ValueError for a negative price.
    """

    price: float = 0.0
    decision: Literal["zeros"] = "zeros"

    def __post_init__(self) -> None:
        if not self.price >= 0:
            raise ValueError(f"price must not be negative, got {self.price}")


class ZeroNeurons(ActivationGroupRouter):
    """A router that keeps, for each token, the MLP neurons whose activation is not exactly 0; outputs do not change.

    In calls of one token, rows of the up projection and columns of the down projection of other neurons are not
    multiplied. hidden_size: not used. neurons: number of MLP neurons. placement: the block in which it is used; None
    outside of a model. config: the options, or pass its fields as keyword arguments.
    """

    Config: ClassVar[type[ZeroNeuronsConfig]] = ZeroNeuronsConfig

    def __init__(
        self,
        hidden_size: int,
        neurons: int,
        placement: Placement | None = None,
        config: ZeroNeuronsConfig | None = None,
        **options: object,
    ) -> None:
        """Build the router.

        hidden_size: not used. neurons: number of the MLP's neurons. placement: the block of the router; None means
        block 0. config: the options; if None, `options`, the fields of `ZeroNeuronsConfig`, are parsed.
        """
        super().__init__()
        self.config = parsed(ZeroNeuronsConfig, config, options)
        self.placement, self.total = placement or Placement(name=NAME), neurons
        self.register_buffer("typical_F", torch.ones(neurons), persistent=False)

    def reset_parameters(self) -> None:
        """Set `typical_F`, fp32 [F], to 1.

        Routers that choose by activations have this factor on the magnitude of each neuron; this one does not need it,
        and checkpoints do not store it.
        """
        init.ones_(self.typical_F)

    @property
    def group_size(self) -> int:
        """The number of neurons per group: 1, because each neuron is switched on its own."""
        return 1

    @property
    def tried(self) -> int:
        """The largest number of neurons for which the up projection is multiplied: all of them."""
        return self.total

    @property
    def kept(self) -> int:
        """The largest number of neurons for which the down projection is multiplied: all of them."""
        return self.total

    @property
    def share_on(self) -> Fraction:
        """The largest share of neurons that can be on (nonzero) for a token: 1."""
        return Fraction(1)

    def counts(self, a_BTF: Tensor) -> tuple[int, int]:
        """Return the numbers of neurons for which up and down projection are multiplied for one token; they are equal.

        a_BTF: the token's activations, of which the nonzero ones are counted. The host waits for the device.
        """
        on = int(a_BTF.count_nonzero())
        return on, on

    @property
    def has_auxiliary_loss(self) -> bool:
        return self.config.price > 0

    def price(self, a_BTF: Tensor) -> Tensor | None:
        """Return each token's auxiliary loss, fp32 [B, T]: `config.price` times the mean of |a| over the F neurons.

        Return None if `config.price` is 0. a_BTF: the neurons' activations.
        """
        return a_BTF.float().abs().mean(-1) * self.config.price if self.config.price else None

    def in_words(self) -> str:
        return "neurons at exactly 0 left out"

    def matrix_share(self, share: Share, single_token: bool) -> Share:
        """Return the share of the MLP's weights that is multiplied if `share` of the neurons is on: (1 + 2 share) / 3.

        The gate matrix is multiplied in full, the other two only for neurons that are on. share: from 0 to 1, as a
        fraction or a tensor with one value per token; the result has the same type. single_token: whether the call has
        one token and no gradient; in all other calls the result is 1.
        """
        return share_of_one_token(share, single_token)

    def worth_trying(self, a_BTF: Tensor) -> tuple[Tensor, Tensor]:
        """Return the magnitudes of all activations, fp32 [B, T, F], and which of them are not 0, bool [B, T, F].

        a_BTF: the activations of all F neurons.
        """
        return a_BTF.detach().float().abs(), a_BTF != 0

    def worth_keeping(self, h_BTF: Tensor) -> Tensor:
        """Return which neurons have a nonzero product of activation and up projection (`h_BTF`), bool [B, T, F]."""
        return h_BTF != 0

    def record(self, score_BTG: Tensor, tried_BTG: Tensor, kept_BTG: Tensor, tokens: Tokens) -> NeuronGroupsRecord:
        return group_record(score_BTG, tried_BTG, kept_BTG, tokens)

    def stream_choice(self) -> NeuronChoice:
        return NeuronChoice(self.placement.name, "zeros", self.typical_F, self.tried, self.kept)

    def empty_record(self, x_BTD: Tensor) -> NeuronGroupsRecord:
        return empty_groups(x_BTD, self.total)

    def set_identity(self) -> None:
        """Do nothing: the MLP's output never depends on this mechanism."""

    def flops(self, tokens: float, routing: str) -> float:
        """Return 0 for any `tokens` and `routing`: only matrix products count as FLOPs, and the choice needs none."""
        return 0
