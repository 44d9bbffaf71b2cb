"""Decisions of causal passes, and the FLOPs that they need as a share of the dense model's.

FLOPs are those of one row at a time; in a batch, rows that keep fewer tokens are padded to the fullest. Shape letters:
N tokens that reached a block.
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
    """The interface to a threshold on scores, which threshold handles of `budget` have."""

    @property
    def threshold(self) -> float:
        """The score above which a token is kept."""

    def scores(self, records: Sequence[Records]) -> Tensor:
        """Return the scores [N] of all tokens of a pass that reached the mechanism."""


@dataclass(frozen=True, kw_only=True)
class Seen:
    """The decisions of causal passes, and the FLOPs that they need.

    needed, dense: FLOPs per token by the cost model, with these decisions and without mechanisms. scores: of the tokens
    that reached each handle's blocks, [N] each; kept: the share of them above its threshold.
    """

    needed: float
    dense: float
    scores: list[Tensor]
    kept: list[float]

    @property
    def share(self) -> float:
        """The needed FLOPs as a share of the dense model's."""
        return self.needed / self.dense


@torch.no_grad()
def observe(
    model: SkipstoneForCausalLM, rows: Iterable[Mapping[str, Tensor]], handles: Sequence[ScoreReader] = ()
) -> Seen:
    """Run causal passes over `rows` (batches of any size) without noise and return the decisions.

    The model must be in evaluation mode.
    """
    scores: list[list[Tensor]] = [[] for _ in handles]
    needed = dense = tokens = 0.0
    for row in rows:
        out = PASSES["executed"].run(model, row, output_records=True)
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
    """Return the FLOPs needed and dense, row by row, because attention grows with the square of what a row keeps."""
    rows, tokens = ids_BT.shape
    needed = 0.0
    for row in range(rows):
        alone = tree_map(partial(_row, row), records)
        needed += forward_flops(model, tokens, kept_from_records(model, alone)).total
    return needed, rows * forward_flops(model, tokens, mechanisms=False).total


def _row(index: int, x: object) -> object:
    return x[index : index + 1] if isinstance(x, Tensor) else x
