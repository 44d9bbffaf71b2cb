"""Linear layers that are initialised in a way of their own."""

from __future__ import annotations

from torch import nn


class OutputLinear(nn.Linear):
    """A projection back into the residual stream; its start may be scaled by 1/sqrt(2 * layers) (GPT-2)."""
