"""Decisions without a trained router: controls that a router has to beat, and decisions that the caller imposes.

Shape letters: B rows, T tokens, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipstone.core.noise import token_noise
from skipstone.core.tokens import Tokens
from skipstone.mechanisms.decisions.base import Decision
from skipstone.mechanisms.schedules import Capacity
from skipstone.ops import reference as ops


def hashed(position_BT: Tensor, seed: int) -> Tensor:
    """Return a pseudo-random number in [0, 1) for each position, fp32 [B, T]; equal positions get equal numbers.

    position_BT: the positions. seed: with another seed, the same positions get other numbers. The numbers are the
    fractional parts of large sines.
    """
    turned = torch.sin(position_BT.double() * 12.9898 + seed * 78.233) * 43758.5453
    return (turned - turned.floor()).float()


class Random(Decision):
    """A control that keeps random tokens at the rate `capacity`.

    In passes with noise, as in training, they are drawn anew; in passes without, as in evaluation and generation, a
    fixed pseudo-random pattern of positions is kept. width: not used. seed: the seed of this pattern; blocks with
    different seeds keep different tokens. options: further options of `Decision`.
    """

    is_causal = True
    reads_scores = False

    def __init__(self, capacity: Capacity | float, width: int, seed: int = 0, **options: Any) -> None:
        super().__init__(capacity, width, **options)
        self.seed = seed

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        if tokens.mode.noise:
            return ops.select_top(
                token_noise(tokens, self.noise_key, len(score_BT)), self.capacity.now, tokens.group_BT
            )
        hashed_BT = hashed(tokens.position_BT, self.seed).expand_as(score_BT)
        return ops.select_top(hashed_BT, self.capacity.now, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return hashed(tokens.position_BT, self.seed).expand_as(score_BT) < self.capacity.now


class Positional(Decision):
    """A control that keeps evenly spaced positions of a document, the share `capacity` of all.

    The constructor takes the arguments of `Decision`, of which only `capacity` (the share, or a `Capacity`) changes
    what is kept.
    """

    is_causal = True
    reads_scores = False

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        """Return the tokens that `causal` keeps, adjusted to exactly the capacity share of a document, bool [B, T].

        The adjustment matters where an outer mechanism has removed tokens, so that positions have gaps. score_BT and
        x_BTD are not used. tokens: documents, padding and positions.
        """
        return ops.select_top(self.causal(score_BT, x_BTD, tokens).float(), self.capacity.now, tokens.group_BT)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        position_BT, share = tokens.position_BT.double(), self.capacity.now * ops.ROUNDING
        before_BT, after_BT = (x * share for x in (position_BT, position_BT + 1))
        return (after_BT.floor() > before_BT.floor()).expand_as(score_BT)


class Forced(Decision):
    """A decision that the caller makes in every call, by `forward(routing={layer: mask})` with bool masks [B, T].

    layer: the index of a block. mask: True for tokens to keep. The constructor takes the arguments of `Decision`, none
    of which changes what is kept. A call without a mask raises ValueError.
    """

    is_causal = True
    reads_scores = False
    imposed = True

    def oracle(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        return self.causal(score_BT, x_BTD, tokens)

    def causal(self, score_BT: Tensor, x_BTD: Tensor, tokens: Tokens) -> Tensor:
        raise ValueError("decision 'forced' needs forward(routing={layer: bool mask [B, T]}) for every routed layer")
