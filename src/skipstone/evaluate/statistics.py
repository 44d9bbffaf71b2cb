"""What mechanisms did, layer by layer, summed up over batches of records.

Shape letters: B rows, T tokens, A activations.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, DepthRecord, Record, Records
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.ops import reference as ops

ACTIVATION_NAMES = tuple(function.__name__ for function in ops.ACTIVATIONS)
ACTIVATION_ROWS = 64


class Statistics:
    """Collects with `add`; `layers()` is the result so far.

    Activations are looked at in the first `activation_rows` rows only: it takes as long as the MLPs themselves, and the
    means hardly move from row to row.
    """

    def __init__(self, model: SkipstoneForCausalLM, activation_rows: int = ACTIVATION_ROWS) -> None:
        self._activation_rows = activation_rows
        blocks: Any = model.model.layers
        self._blocks = [block.adjustables() for block in blocks]
        self._sums: list[dict[str, _Depth | _Activation]] = [{} for _ in self._blocks]

    @torch.no_grad()
    def add(self, records: Sequence[Records]) -> None:
        for mechanisms, sums, decided in zip(self._blocks, self._sums, records, strict=True):
            for name, record in decided.items():
                if isinstance(record, DepthRecord):
                    sums.setdefault(name, _Depth()).add(mechanisms[name], record)
                elif self._activation_rows:
                    sums.setdefault(name, _Activation(self._activation_rows)).add(mechanisms[name], record)

    def layers(self) -> list[dict[str, dict[str, Any]]]:
        """For each block and each of its mechanisms:

        depth: `capacity`, kept tokens by asked tokens; `capacity_p99`, that share's 99th percentile over rows (of rows
        in which somebody was asked); `weight`, the mean factor on a kept token's update, None where none was kept.
        activation: `shares` of the four functions and `entropy` as a share of its maximum, means over
        tokens and neurons of the first rows.
        """
        return [{name: total.result() for name, total in sums.items()} for sums in self._sums]


class _Depth:
    def __init__(self) -> None:
        self.asked = self.kept = 0
        self.weight = 0.0
        self.rows: list[Tensor] = []

    def add(self, mechanism: Any, record: Record) -> None:
        assert isinstance(record, DepthRecord)
        asked_B, kept_B = record.asked_BT.sum(1), (record.kept_BT & record.asked_BT).sum(1)
        self.asked += int(asked_B.sum())
        self.kept += int(kept_B.sum())
        self.weight += float(record.weight_BT[record.kept_BT].double().sum())
        self.rows.append((kept_B / asked_B)[asked_B > 0].cpu())

    def result(self) -> dict[str, Any]:
        rows = torch.cat(self.rows).double()
        return {
            "capacity": self.kept / self.asked if self.asked else None,
            "capacity_p99": _quantile(rows, 0.99),
            "weight": self.weight / self.kept if self.kept else None,
        }


def _quantile(x_N: Tensor, q: float) -> float | None:
    """By sorting: torch.quantile refuses more than 16 million values."""
    if not len(x_N):
        return None
    return float(x_N.sort().values[min(int(q * len(x_N)), len(x_N) - 1)])


class _Activation:
    def __init__(self, rows: int) -> None:
        self.rows_left, self.tokens = rows, 0
        self.shares = torch.zeros(len(ACTIVATION_NAMES), dtype=torch.float64)
        self.entropy = 0.0

    def add(self, mechanism: Any, record: Record) -> None:
        assert isinstance(record, ActivationRecord)
        rows = min(self.rows_left, len(record.asked_BT))
        self.rows_left -= rows
        for row in range(rows):  # one at a time: [T, neurons, A] is the largest tensor here
            asked_T = record.asked_BT[row]
            part = ActivationRecord(record.logits_BTA[row : row + 1], asked_T[None])
            shares_TA, entropy_T = mechanism.shares(part)[0].double(), mechanism.entropy(part)[0].double()
            self.shares += shares_TA.expand(len(asked_T), -1)[asked_T].sum(0).cpu()
            self.entropy += float(entropy_T.expand(len(asked_T))[asked_T].sum())
            self.tokens += int(asked_T.sum())

    def result(self) -> dict[str, Any]:
        shares = (self.shares / max(self.tokens, 1)).tolist()
        return {
            "shares": dict(zip(ACTIVATION_NAMES, shares, strict=True)),
            "entropy": self.entropy / max(self.tokens, 1),
        }
