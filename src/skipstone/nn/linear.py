"""Linear layers with an initialisation of their own."""

from __future__ import annotations

from torch import nn


class OutputLinear(nn.Linear):
    """A projection into the residual stream, whose initial weights may be scaled by 1/sqrt(2 * layers), as in GPT-2."""
