"""Whether drawn tokens follow a distribution."""

from __future__ import annotations

import torch
from torch import Tensor


def plausible(counts: Tensor, expected: Tensor) -> bool:
    """Pearson's chi-square test at 1 %."""
    statistic = ((counts - expected) ** 2 / expected).sum().double()
    return bool(torch.special.gammaincc(torch.tensor((len(counts) - 1) / 2).double(), statistic / 2) > 0.01)
