"""Exploration: noise on the scores while training, so that tokens just below the threshold are sometimes kept.

A router learns only from the tokens that it keeps, so it cannot learn the value of tokens that it never tries. Gumbel
noise on the scores before a top-k draws without replacement from the softmax of score / scale (arXiv 1903.06059). Shape
letters: B rows, T tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from skipstone.mechanisms.schedules import UNIT, Progress


class Exploration(nn.Module):
    """Gumbel noise on router scores in training, so that tokens just below the threshold are sometimes kept.

    scale: the initial factor on the noise. until: the fraction of the training, in (0, 1], over which the factor falls
    linearly to 0. The noise affects which tokens are selected, not the weights of their updates.
    """

    def __init__(self, scale: float, until: float) -> None:
        super().__init__()
        self.scale = scale
        self.progress = Progress(until)

    def forward(self, score_BT: Tensor, noise_BT: Tensor, reached_BT: Tensor, capacity: float | None = None) -> Tensor:
        """Return scores with noise, fp32 [B, T], without a gradient; they are only used to choose tokens.

        score_BT: router scores. noise_BT: uniform random numbers in (0, 1). reached_BT: bool, tokens that are neither
        padding nor skipped by an outer mechanism; quantiles are taken over these. capacity: the share of tokens to
        keep, if a threshold decides: all scores are then shifted so that their (1 - capacity) quantile over the call
        stays that of the scores without noise, to which the threshold was fitted. None means no shift, for top-k.
        """
        score_BT = score_BT.detach()
        # read from the buffer; a Python number would make torch.compile build a new graph in every step
        amplitude = self.scale * (1 - self.progress.millionths / UNIT)
        explored_BT = score_BT - amplitude * (-noise_BT.log()).log()
        if capacity is None:
            return explored_BT
        lifted, plain = (
            torch.where(reached_BT, x_BT, torch.nan).nanquantile(1 - capacity) for x_BT in (explored_BT, score_BT)
        )
        return explored_BT - (lifted - plain)
