"""What the neurons of each layer mix, of a pass without noise: overall, neuron by neuron, and by category of token.

Shape letters: B rows, T tokens, F neurons, A activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import ActivationRecord, Records

CATEGORIES = ("letters", "digits", "signs", "white space")


@dataclass(frozen=True, kw_only=True)
class ActivationSummary:
    """One layer. shares: mean share of each activation. entropy: of the mix, as a share of its maximum. strongest: of
    each neuron, the activation that its mean logits favour. by_category: shares for the tokens of each category that
    occurs.
    """

    shares: list[float]
    entropy: float
    strongest: list[int]
    by_category: Mapping[str, list[float]]

    def shift(self, category: str) -> float:
        """Total variation distance between this category's shares and those of all tokens: 0 alike, 1 disjoint."""
        return sum(abs(a - b) for a, b in zip(self.by_category[category], self.shares, strict=True)) / 2


def category_of(token: str) -> int:
    """The place in CATEGORIES of a token's text."""
    for category, belongs in enumerate((str.isalpha, str.isdigit)):
        if any(map(belongs, token)):
            return category
    return 2 if token.strip() else 3


def summarise_activations(
    blocks: Sequence[Any], records: Sequence[Records], category_BT: Tensor | None
) -> dict[int, ActivationSummary]:
    """By layer, where neurons mix. category_BT: int64, of the tokens; None where their text is not known."""
    found = {}
    for layer, (block, decided) in enumerate(zip(blocks, records, strict=True)):
        modules = block.routing_modules()
        for name, record in decided.items():
            if isinstance(record, ActivationRecord) and record.reached_BT.any():
                found[layer] = _summary(modules[name], record, category_BT)
    return found


def _summary(module: Any, record: ActivationRecord, category_BT: Tensor | None) -> ActivationSummary:
    reached_BT = record.reached_BT.cpu()
    shares_NA, entropy_N = _each(module.shares, record), _each(module.entropy, record)
    logits_NA = record.logits_BTA.expand(*record.reached_BT.shape, -1)[record.reached_BT].float()
    by_category = {} if category_BT is None else _by_category(shares_NA, category_BT.expand_as(reached_BT)[reached_BT])
    return ActivationSummary(
        shares=shares_NA.mean(0).tolist(),
        entropy=entropy_N.mean().item(),
        strongest=(module.preference_FA + logits_NA.mean(0)).argmax(-1).tolist(),
        by_category=by_category,
    )


def _by_category(shares_NA: Tensor, category_N: Tensor) -> dict[str, list[float]]:
    """Means over the tokens of each category that occurs."""
    return {
        category: shares_NA[category_N == k].mean(0).tolist()
        for k, category in enumerate(CATEGORIES)
        if category_N.eq(k).any()
    }


def _each(measure: Callable[[ActivationRecord], Tensor], record: ActivationRecord) -> Tensor:
    """A statistic [1, T or 1, ...] of every asked token, [N, ...], a row at a time: each neuron has its own mix."""
    found = []
    for logits_TA, reached_T in zip(record.logits_BTA, record.reached_BT, strict=True):
        value_T = measure(ActivationRecord(logits_TA[None], reached_T[None]))[0]
        found.append(value_T.expand(len(reached_T), *value_T.shape[1:])[reached_T].cpu())
    return torch.cat(found)
