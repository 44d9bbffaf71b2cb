"""Figures of mechanisms in training passes, for the log.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from skipstone.core.records import Records
from skipstone.core.routing_module import RoutingModule
from skipstone.measure.summaries import READERS


class RecordMeter:
    """Means of mechanisms' figures over micro-batches, for the log; only `read` makes the host wait.

    capacity/L/NAME: share kept of the tokens that reached NAME in block L. gate/L/NAME: their mean weight.
    entropy/L/NAME: mean entropy of the activation mix, or of a token's softmax over experts, as a share of its maximum.
    diversity/L/NAME: share of neurons whose strongest activation is not that of most. dynamic_entropy/L/NAME,
    static_entropy/L/NAME: the paper's, in nats, without tau: of all logits, and of the neurons' preferences alone.
    no_op/L/NAME, busiest/L/NAME: share of all choices that are no-ops, and that are a pass's most chosen expert.
    on/L/NAME: share of the groups of neurons that are on for a token, in the mean. changing/L/NAME: share of the groups
    that are on for some tokens of a pass and off for others.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # [numerator, denominator]

    @torch.no_grad()
    def add(self, mechanisms: Iterable[RoutingModule], records: tuple[Records, ...], counts: bool = True) -> None:
        """Add the figures of one pass. counts: False only makes the names known, as several processes must agree on."""
        for mechanism in mechanisms:
            placement = mechanism.placement
            record = records[placement.layer].get(placement.name)
            if record is None:
                continue
            for kind, total, count in READERS[type(record)].log_pairs(mechanism, record):
                key, pair = f"{kind}/{placement.layer}/{placement.name}", torch.stack((total.float(), count.float()))
                pair = pair if counts else torch.zeros_like(pair)
                self._sums[key] = self._sums[key] + pair if key in self._sums else pair

    def read(self, summed: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """Return the means so far, without those of nothing, and empty the meter. summed: over several processes."""
        if not self._sums:
            return {}
        stacked = torch.stack(list(self._sums.values()))
        names, pairs = list(self._sums), (stacked if summed is None else summed(stacked)).tolist()
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}


def moving(mechanisms: Iterable[RoutingModule]) -> dict[str, float]:
    """Return the quantities that the callback changes, by the names that mechanisms use: `tau`, `threshold/L/NAME`."""
    return {name: value.item() for mechanism in mechanisms for name, value in mechanism.moving().items()}
