"""The decisions of forward passes in which no decision looks at a later token, and the FLOPs that they need.

FLOPs are those of rows that are computed one at a time, without the padding that a batch gives to rows that keep fewer
tokens. Shape letters: N tokens that reached a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from skipstone.core.progress_bar import advance
from skipstone.core.records import Records
from skipstone.measure.passes import PASSES
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import forward_flops, kept_from_records


class ScoreReader(Protocol):
    """The interface of a threshold on router scores; the threshold objects of `skipstone.budget` implement it."""

    @property
    def threshold(self) -> float:
        """The score above which a token is kept."""

    def scores(self, records: Sequence[Records]) -> Tensor:
        """Return the scores of a pass that this threshold is compared with, fp32 [N].

        N is the number of tokens that reached the threshold's blocks, summed over these blocks; scores are ordered by
        block. records: decisions of the pass, a dict by mechanism name for each block.
        """


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The decisions of passes that look at no later token (as in generation), and the FLOPs that they need.

    needed: forward FLOPs per token by the formulas of `model.cost`, with these decisions. dense: the FLOPs of the same
    model without any mechanism. scores: for each threshold an fp32 tensor [N] of the scores of the N tokens that
    reached its blocks. kept: for each threshold, the share of its scores that are above it; 0 if there are none.
    """

    needed: float
    dense: float
    scores: list[Tensor]
    kept: list[float]

    @property
    def share(self) -> float:
        """The needed FLOPs divided by those of the dense model."""
        return self.needed / self.dense


@torch.no_grad()
def observe(
    model: SkipstoneForCausalLM, rows: Iterable[Mapping[str, Tensor]], handles: Sequence[ScoreReader] = ()
) -> Seen:
    """Run a model over rows and return its decisions, which look at no later token and are made without noise.

    model: must be in evaluation mode. rows: batches of any size, as dicts of input tensors on the model's device.
    handles: the thresholds whose scores are returned, in the order of the result's `scores` and `kept`. Raises
    ValueError for a model that is not a Skipstone model.
    """
    scores: list[list[Tensor]] = [[] for _ in handles]
    needed = dense = tokens = 0.0
    for row in rows:
        out = PASSES["executed"].run(model, row, output_records=True, logits_to_keep=1)  # none is read
        assert out.records is not None
        for handle, found in zip(handles, scores, strict=True):
            found.append(handle.scores(out.records).to(row["input_ids"].device))
        of_row, dense_of_row = spent(model, row["input_ids"], out.records)
        needed, dense, tokens = needed + of_row, dense + dense_of_row, tokens + row["input_ids"].numel()
        advance("rows", len(row["input_ids"]), f"decisions  {needed / dense:.1%} of the dense FLOPs")
    joined = [torch.cat(found) for found in scores]
    kept = [
        float((s > handle.threshold).double().mean()) if len(s) else 0.0
        for handle, s in zip(handles, joined, strict=True)
    ]
    return Seen(needed=needed / tokens, dense=dense / tokens, scores=joined, kept=kept)


def spent(model: SkipstoneForCausalLM, ids_BT: Tensor, records: Sequence[Records]) -> tuple[float, float]:
    """Return a batch's forward FLOPs with its recorded decisions, and without mechanisms, each summed over rows.

    Each row is counted by itself, without the padding that a batch would add, because attention grows with the square
    of the tokens that a row keeps. ids_BT: token ids [B, T] (rows, tokens), of which only the shape is used. records:
    the decisions of a forward pass over these ids, a dict by mechanism name for each block.
    """
    rows, tokens = ids_BT.shape
    needed = 0.0
    for row in range(rows):
        alone = tree_map(partial(_row, row), records)
        needed += forward_flops(model, tokens, kept_from_records(model, alone)).total
    return needed, rows * forward_flops(model, tokens, mechanisms=False).total


def _row(index: int, x: object) -> object:
    return x[index : index + 1] if isinstance(x, Tensor) else x
