"""What the neurons of each layer mix, of a pass without noise: overall, neuron by neuron, and by kind of token.

Shape letters: B rows, T tokens, F neurons, A activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, Records

KINDS = ("letters", "digits", "signs", "white space")


@dataclass(frozen=True, kw_only=True)
class Mixing:
    """One layer. shares: mean share of each activation. entropy: of the mix, as a share of its maximum. strongest: of
    each neuron, the activation that its mean logits favour. by_kind: shares for the tokens of each kind that occurs.
    """

    shares: list[float]
    entropy: float
    strongest: list[int]
    by_kind: Mapping[str, list[float]]

    def shift(self, kind: str) -> float:
        """Total variation distance between the shares for this kind and those for all tokens: 0 alike, 1 disjoint."""
        return sum(abs(a - b) for a, b in zip(self.by_kind[kind], self.shares, strict=True)) / 2


def kind_of(token: str) -> int:
    """The place in KINDS of a token's text."""
    for kind, belongs in enumerate((str.isalpha, str.isdigit)):
        if any(map(belongs, token)):
            return kind
    return 2 if token.strip() else 3


def look_at(blocks: Sequence[Any], records: Sequence[Records], kind_BT: Tensor | None) -> dict[int, Mixing]:
    """By layer, where neurons mix. kind_BT: int64, the kinds of the tokens; None where their text is not known."""
    found = {}
    for layer, (block, decided) in enumerate(zip(blocks, records, strict=True)):
        modules = block.adjustables()
        for name, record in decided.items():
            if isinstance(record, ActivationRecord) and record.asked_BT.any():
                found[layer] = _mixing(modules[name], record, kind_BT)
    return found


def _mixing(module: Any, record: ActivationRecord, kind_BT: Tensor | None) -> Mixing:
    asked_BT = record.asked_BT.cpu()
    shares_NA, entropy_N = _each(module.shares, record), _each(module.entropy, record)
    logits_NA = record.logits_BTA.expand(*record.asked_BT.shape, -1)[record.asked_BT].float()
    by_kind = {} if kind_BT is None else _by_kind(shares_NA, kind_BT.expand_as(asked_BT)[asked_BT])
    return Mixing(
        shares=shares_NA.mean(0).tolist(),
        entropy=entropy_N.mean().item(),
        strongest=(module.preference_FA + logits_NA.mean(0)).argmax(-1).tolist(),
        by_kind=by_kind,
    )


def _by_kind(shares_NA: Tensor, kind_N: Tensor) -> dict[str, list[float]]:
    """Means over the tokens of each kind that occurs."""
    return {kind: shares_NA[kind_N == k].mean(0).tolist() for k, kind in enumerate(KINDS) if kind_N.eq(k).any()}


def _each(measure: Callable[[ActivationRecord], Tensor], record: ActivationRecord) -> Tensor:
    """A statistic [1, T or 1, ...] of every asked token, [N, ...], a row at a time: each neuron has its own mix."""
    found = []
    for logits_TA, asked_T in zip(record.logits_BTA, record.asked_BT, strict=True):
        value_T = measure(ActivationRecord(logits_TA[None], asked_T[None]))[0]
        found.append(value_T.expand(len(asked_T), *value_T.shape[1:])[asked_T].cpu())
    return torch.cat(found)
