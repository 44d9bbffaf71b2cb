"""How well a decision keeps whom it should: precision, recall and F1.

A decision that always skips is right about 87.5 % of the tokens at capacity 0.125, so accuracy says nothing here.
Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from torch import Tensor


class PrecisionRecall:
    """Counts with `add`; `result()` is the figures so far."""

    def __init__(self) -> None:
        self.kept = self.wanted = self.both = 0

    def add(self, kept_BT: Tensor, wanted_BT: Tensor, asked_BT: Tensor) -> None:
        """bool each; only tokens that were asked count."""
        kept_BT, wanted_BT = kept_BT & asked_BT, wanted_BT & asked_BT
        self.kept += int(kept_BT.sum())
        self.wanted += int(wanted_BT.sum())
        self.both += int((kept_BT & wanted_BT).sum())

    def result(self) -> dict[str, float | None]:
        """precision: right among the kept; recall: kept among the wanted; f1: their harmonic mean. None without any."""
        both = self.kept + self.wanted
        return {
            "precision": self.both / self.kept if self.kept else None,
            "recall": self.both / self.wanted if self.wanted else None,
            "f1": 2 * self.both / both if both else None,
        }
