"""What mechanisms did in a pass, as numbers to log.

Shape letters: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, DepthRecord, ExpertsRecord, NeuronGroupsRecord, Record, Records

ONE_ROW = slice(1)  # the figures of a mix look at every neuron of every token: one row is enough to log


class RecordMeter:
    """Sums over micro-batches, on the device; `read` makes the host wait once.

    capacity/L/NAME: share of the tokens asked in block L that NAME kept. gate/L/NAME: mean weight of the tokens asked.
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
    def add(self, mechanisms: Iterable[Any], records: tuple[Records, ...]) -> None:
        for mechanism in mechanisms:
            placement = mechanism.placement
            record = records[placement.layer].get(placement.name)
            for kind, pair in _pairs(mechanism, record):
                key = f"{kind}/{placement.layer}/{placement.name}"
                self._sums[key] = self._sums[key] + pair if key in self._sums else pair

    def read(self) -> dict[str, float]:
        """The means so far, without those of nothing; the meter is empty afterwards."""
        if not self._sums:
            return {}
        names, pairs = list(self._sums), torch.stack(list(self._sums.values())).tolist()
        self._sums = {}
        return {name: total / count for name, (total, count) in zip(names, pairs, strict=True) if count}


def _pairs(mechanism: Any, record: Record | None) -> list[tuple[str, Tensor]]:
    if isinstance(record, DepthRecord):
        reached_BT = record.reached_BT
        count = reached_BT.sum()
        kept = (record.kept_BT & reached_BT).sum()
        weight = torch.where(reached_BT, record.weight_BT, 0.0).sum()
        return [("capacity", _pair(kept, count)), ("gate", _pair(weight, count))]
    if isinstance(record, ActivationRecord):
        row = ActivationRecord(record.logits_BTA[ONE_ROW], record.reached_BT[ONE_ROW])
        figures = {name: getattr(mechanism, name)(row) for name in ("entropy", "diversity", "dynamic_entropy")}
        pairs = [(name, _pair(x_BT.nansum(), x_BT.isfinite().sum())) for name, x_BT in figures.items()]
        static = mechanism.static_entropy()
        return [*pairs, ("static_entropy", _pair(static, torch.ones_like(static)))]
    if isinstance(record, ExpertsRecord):
        chosen_X, entropy_BT = record.chosen_BTX.sum((0, 1)), mechanism.entropy(record)
        count, real_X = chosen_X.sum(), chosen_X[: mechanism.config.count]
        entropy = _pair(entropy_BT.nansum(), record.reached_BT.sum())
        return [
            ("no_op", _pair(count - real_X.sum(), count)),
            ("busiest", _pair(real_X.max(), count)),
            ("entropy", entropy),
        ]
    if isinstance(record, NeuronGroupsRecord):
        on_G, count = record.kept_BTG.sum((0, 1)), record.reached_BT.sum()
        changing, total = ((on_G > 0) & (on_G < count)).sum(), torch.full_like(count, len(on_G))
        return [("on", _pair(on_G.sum(), count * total)), ("changing", _pair(changing, total))]
    return []


def _pair(total: Tensor, count: Tensor) -> Tensor:
    return torch.stack((total.float(), count.float()))


def moving(mechanisms: Iterable[Any]) -> dict[str, float]:
    """What the callback moves: `tau` (one for the model) and `threshold/L/NAME`."""
    found: dict[str, float] = {}
    for mechanism in mechanisms:
        for name, buffer in mechanism.named_buffers():
            if name == "tau":
                found["tau"] = buffer.item()
            elif name.endswith("threshold"):
                found[f"threshold/{mechanism.placement.layer}/{mechanism.placement.name}"] = buffer.item()
    return found
