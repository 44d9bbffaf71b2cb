"""Loss and depth of each kind of token, where the data tell kinds apart.

operations are known to need depth (difficulty 0 and above), fillers not to (-1); what text needs is unknown (below).
Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import DepthRecord, Records
from skipstone.model.causal_lm import IGNORED

KINDS = ("operations", "fillers", "text")


class TokenKinds:
    """Collects with `add`; `result()` is the figures so far."""

    def __init__(self) -> None:
        self._sums = {kind: torch.zeros(4, dtype=torch.float64) for kind in KINDS}

    def add(
        self, nats_BT: Tensor, target_BT: Tensor, records: Sequence[Records], difficulty_BT: Tensor, real_BT: Tensor
    ) -> None:
        """nats_BT: 0 where nothing is asked. real_BT: bool, no padding."""
        depth_BT, asked_BT = depths(records, real_BT), target_BT != IGNORED
        masks = (difficulty_BT >= 0, difficulty_BT == -1, difficulty_BT < -1)
        for sums, mask_BT in zip(self._sums.values(), masks, strict=True):
            inside_BT = mask_BT & real_BT
            parts = (nats_BT[inside_BT], asked_BT[inside_BT], depth_BT[inside_BT], inside_BT)
            sums += torch.stack([part.double().sum().cpu() for part in parts])

    def result(self) -> dict[str, dict[str, Any]]:
        """By kind, those that occur: `loss` in nats a prediction, `depth`: blocks that update a token, in the mean."""
        found = {}
        for kind, sums in self._sums.items():
            nats, predictions, depth, tokens = sums.tolist()
            if tokens:
                found[kind] = {"loss": nats / predictions if predictions else None, "depth": depth / tokens}
        return found


def depths(records: Sequence[Records], real_BT: Tensor) -> Tensor:
    """int64 [B, T]: blocks that update each token. One whose attention or MLP alone is kept does not count."""
    depth_BT = torch.zeros(real_BT.shape, dtype=torch.int64, device=real_BT.device)
    for decided in records:
        kept_BT = real_BT
        for record in decided.values():
            kept_BT = kept_BT & record.kept_BT if isinstance(record, DepthRecord) else kept_BT
        depth_BT += kept_BT
    return depth_BT
