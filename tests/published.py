"""Figures by the papers' definitions, for comparison with our own.

    alpha = mean over gated blocks of the mean weight of a token's update
    saved = 1 - (ungated blocks + sum of the gated blocks' means) / blocks                  ("TLOps", arXiv 2605.05222)
    entropy of a block = mean over rows and neurons of H(softmax(alpha + beta * gate_net))  (PolyGLU, arXiv 2603.13347)

In a soft pass the first two count scaled updates as saved, although all are computed; in a hard pass with gain 1 they
count skipped ones. The third omits the temperature of the executed mix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from skipstone.core.records import ActivationRecord, DepthRecord, Records
from skipstone.model.causal_lm import SkipstoneForCausalLM


@dataclass(frozen=True, kw_only=True)
class TokenLayers:
    """Figures of one pass by the definitions of arXiv 2605.05222.

    alpha: mean weight of updates in gated blocks, 1 if there are none. saved: share of (token, block) pairs that count
    as saved, in [0, 1].
    """

    alpha: float
    saved: float


def token_layers(records: Sequence[Records]) -> TokenLayers:
    """Return alpha and saved of one forward pass, from its records. Weights of several gates in one block multiply."""
    weights = [_weight(decided) for decided in records]
    gated = [weight for weight in weights if weight is not None]
    total = sum(gated) + len(weights) - len(gated)
    return TokenLayers(alpha=sum(gated) / len(gated) if gated else 1.0, saved=1 - total / len(weights))


def _weight(decided: Records) -> float | None:
    """Return the mean weight of a block's update over the tokens that reached it; None for a block without a gate.

    decided: the block's records by mechanism name.
    """
    found = [record for record in decided.values() if isinstance(record, DepthRecord)]
    if not found:
        return None
    product_BT = torch.stack([record.weight_BT for record in found]).prod(0)
    return float(product_BT[found[0].reached_BT].double().mean())


@torch.no_grad()
def dynamic_entropies(model: SkipstoneForCausalLM, records: Sequence[Records]) -> list[float | None]:
    """Return the dynamic entropy of each block in nats, at most ln 4; None for blocks whose activation does not route.

    records: those of a pass.
    """
    blocks: Any = model.model.layers
    found: list[float | None] = []
    for block, decided in zip(blocks, records, strict=True):
        entropies = [
            block.routing_modules()[name].dynamic_entropy(record)
            for name, record in decided.items()
            if isinstance(record, ActivationRecord)
        ]
        found.append(float(entropies[0].nanmean()) if entropies else None)
    return found
