"""How often the state is right, by the depth that it needs, and how much of the gain was captured: Reset-S3 and kin."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from skipstone.data.synthetic import BINS, accuracy_by_bin

OVERALL = "all operations"
MEASURED = (*BINS, OVERALL)


class Accuracy:
    """Collects the predictions of operations; fillers, which a model copies, are in no bin."""

    def __init__(self) -> None:
        self._parts: list[tuple[Tensor, Tensor, Tensor]] = []

    def add(self, logits_BTV: Tensor, target_BT: Tensor, difficulty_BT: Tensor) -> None:
        operation_BT = difficulty_BT >= 0
        columns = logits_BTV.argmax(-1), target_BT, difficulty_BT
        guess, target, difficulty = (x[operation_BT].cpu() for x in columns)
        self._parts.append((guess, target, difficulty))

    def by_bin(self) -> dict[str, float]:
        """Shares in [0, 1] of each bin and of all operations together; nan for a bin without operations."""
        guess, target, difficulty = (torch.cat(column) for column in zip(*self._parts, strict=True))
        overall = float((guess == target).double().mean()) if len(guess) else math.nan
        return {**accuracy_by_bin(guess, target, difficulty), OVERALL: overall}


def headroom_captured(learned: float, dense: float, forced: float) -> float:
    """(learned - dense) / (forced - dense), of accuracies at equal executed FLOPs.

    1: the learned routing is as good as routing by the known difficulty; 0: as the dense model; nan where the two
    references do not differ, so that there is nothing to capture.
    """
    return math.nan if forced == dense else (learned - dense) / (forced - dense)


def headroom(learned: Mapping[str, float], dense: Mapping[str, float], forced: Mapping[str, float]) -> dict[str, float]:
    """`headroom_captured` of each bin and overall."""
    return {name: headroom_captured(learned[name], dense[name], forced[name]) for name in MEASURED}
