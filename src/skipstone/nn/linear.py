"""Linear layers that are initialised in a way of their own, and dropout that costs nothing where there is none."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


def dropped(x: Tensor, probability: float, training: bool) -> Tensor:
    """Dropout; without a module, whose call is felt in decoding."""
    return F.dropout(x, probability, training) if probability else x


class OutputLinear(nn.Linear):
    """A projection back into the residual stream; its start may be scaled by 1/sqrt(2 * layers) (GPT-2)."""
