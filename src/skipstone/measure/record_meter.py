"""`RecordMeter`: averages capacities, gates, entropies and the like of mechanisms over training passes, for the log.

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
    """Averages figures of mechanisms over micro-batches for the training log; only `read` makes the host wait.

    The names of the figures are KIND/L/NAME, such as capacity/3/mod: the kind, the index of the block, and the
    mechanism's name in it. The kinds are as follows. capacity: kept tokens as a share of those that reached the
    mechanism. gate: mean factor on the updates of the tokens that reached the mechanism, 0 for a skipped one. entropy:
    mean entropy of a neuron's mix of activation functions, or of a token's softmax over experts, divided by the largest
    possible one. diversity: share of neurons whose strongest activation is not the most common one. dynamic_entropy,
    static_entropy: mean entropies of the mixes in nats at temperature 1, as in the PolyGLU paper, of all logits and of
    the neurons' learned preferences alone. no_op: share of all choices of experts that are no-ops. busiest: share of
    all choices that fall on the expert chosen most often in a pass. on: mean share of neuron groups that are on for a
    token. changing: share of groups that are on for some tokens of a pass and off for others. Figures of mixes of
    activations are taken from the first row of a pass only.
    """

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}  # [numerator, denominator]

    @torch.no_grad()
    def add(self, mechanisms: Iterable[RoutingModule], records: tuple[Records, ...], counts: bool = True) -> None:
        """Add the figures of one forward pass.

        mechanisms: the model's mechanisms. records: decisions of the pass, a dict by mechanism name for each block.
        counts: whether the pass enters the means. False adds only the names of its figures, because processes that sum
        their meters need to have the same names.
        """
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
        """Return the means since the last call by name, and empty the meter.

        Figures for which nothing was counted are left out. summed: a function that sums a tensor over all processes
        that train together; None means that there is one process.
        """
        if not self._sums:
            return {}
        stacked = torch.stack(list(self._sums.values()))
        names, pairs = list(self._sums), (stacked if summed is None else summed(stacked)).tolist()
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}


def moving(mechanisms: Iterable[RoutingModule]) -> dict[str, float]:
    """Return the current values of all thresholds and temperatures that training adjusts after each step.

    The keys are the names used in the log: `threshold/3/mod` for the mechanism "mod" in block 3, `tau` for PolyGLU's
    temperature, which all blocks share. mechanisms: the mechanisms of the model.
    """
    return {name: value.item() for mechanism in mechanisms for name, value in mechanism.moving().items()}
