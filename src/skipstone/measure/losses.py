"""Loss and accuracy of a model, run by one pass, over all evaluation rows.

Shape letters: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.measure.accuracy import Accuracy
from skipstone.measure.passes import Pass, targets
from skipstone.measure.summaries import ACTIVATION_ROWS, Statistics
from skipstone.measure.token_kinds import TokenKinds
from skipstone.model.causal_lm import IGNORED, SkipstoneForCausalLM


@dataclass(frozen=True, kw_only=True)
class LossResult:
    """nats: summed over `predictions`, in double precision. right: predictions whose likeliest token is the label.

    accuracy: by bin, and kinds: by kind of token (see `kinds`), where the data tell the difficulty, else None.
    """

    nats: float
    predictions: int
    right: int
    statistics: Statistics
    accuracy: dict[str, float] | None
    kinds: dict[str, dict[str, Any]] | None

    @property
    def loss(self) -> float:
        """Nats a prediction."""
        return self.nats / self.predictions

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))  # 700: the largest power that a double holds

    def bits_per_byte(self, num_bytes: int | None) -> float | None:
        return None if not num_bytes else self.nats / math.log(2) / num_bytes


def measure_loss(
    model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]], activations: bool = True
) -> LossResult:
    """One pass over `batches`. No figure depends on how rows are batched, but for rounding."""
    nats, predictions, right = 0.0, 0, 0
    statistics = Statistics(model, activation_rows=ACTIVATION_ROWS if activations else 0)
    known: tuple[Accuracy, TokenKinds] | None = None
    for batch in batches:
        out = forward.run(model, batch, output_records=True)
        assert out.logits is not None
        assert out.records is not None
        target_BT = targets(batch)
        nats_BT = token_nats(out.logits, target_BT)
        nats += float(nats_BT.double().sum())
        predictions += int((target_BT != IGNORED).sum())
        right += int((out.logits.argmax(-1) == target_BT).sum())
        statistics.add(out.records, batch["difficulty"] >= 0 if "difficulty" in batch else None)
        if "difficulty" in batch:
            accuracy, kinds = known = known or (Accuracy(), TokenKinds())
            accuracy.add(out.logits, target_BT, batch["difficulty"])
            kinds.add(nats_BT, target_BT, out.records, batch["difficulty"], _real(batch))
    return LossResult(
        nats=nats,
        predictions=predictions,
        right=right,
        statistics=statistics,
        accuracy=None if known is None else known[0].by_bin(),
        kinds=None if known is None else known[1].result(),
    )


def _real(batch: Mapping[str, Tensor]) -> Tensor:
    """bool [B, T]: no padding."""
    return batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()


def token_nats(logits_BTV: Tensor, target_BT: Tensor) -> Tensor:
    """fp32 cross-entropy of each token [B, T], 0 where nothing is asked."""
    flat = F.cross_entropy(
        logits_BTV.flatten(0, 1).float(), target_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return flat.view_as(target_BT)
