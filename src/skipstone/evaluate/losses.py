"""Loss and accuracy of a model, run in one way, over all evaluation rows.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from skipstone.evaluate.accuracy import Accuracy
from skipstone.evaluate.statistics import ACTIVATION_ROWS, Statistics
from skipstone.evaluate.ways import Way, targets
from skipstone.model.causal_lm import IGNORED, SkipstoneForCausalLM


@dataclass(frozen=True, kw_only=True)
class Measured:
    """nats: summed over `predictions`, in double precision. accuracy: by bin, where the data tell the difficulty."""

    nats: float
    predictions: int
    statistics: Statistics
    accuracy: dict[str, float] | None

    @property
    def loss(self) -> float:
        """Nats a prediction."""
        return self.nats / self.predictions

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # 700: the largest power that a double holds

    def bits_per_byte(self, num_bytes: int | None) -> float | None:
        return None if not num_bytes else self.nats / math.log(2) / num_bytes


def measure(
    model: SkipstoneForCausalLM, way: Way, batches: Iterable[Mapping[str, Tensor]], activations: bool = True
) -> Measured:
    """One pass over `batches`. No figure depends on how rows are batched, but for rounding."""
    nats, predictions = 0.0, 0
    statistics, accuracy = Statistics(model, activation_rows=ACTIVATION_ROWS if activations else 0), None
    for batch in batches:
        out = way.run(model, batch, output_records=True)
        assert out.logits is not None
        assert out.records is not None
        target_BT = targets(batch)
        nats += float(token_nats(out.logits, target_BT).double().sum())
        predictions += int((target_BT != IGNORED).sum())
        statistics.add(out.records, batch["difficulty"] >= 0 if "difficulty" in batch else None)
        if "difficulty" in batch:
            accuracy = accuracy or Accuracy()
            accuracy.add(out.logits, target_BT, batch["difficulty"])
    return Measured(
        nats=nats,
        predictions=predictions,
        statistics=statistics,
        accuracy=None if accuracy is None else accuracy.by_bin(),
    )


def token_nats(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """fp32 cross-entropy of each token [B, T], 0 where nothing is asked."""
    flat = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(target_BT)
