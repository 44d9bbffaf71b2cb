"""A linear layer that is marked as a projection into the residual stream."""

from __future__ import annotations

from torch import nn


class OutputLinear(nn.Linear):
    """An nn.Linear that projects into the residual stream; its class tells a model's initialisation so.

    With `scaled_output_init`, the initial weights are divided by sqrt(2 * number of blocks), as in GPT-2.
    """
