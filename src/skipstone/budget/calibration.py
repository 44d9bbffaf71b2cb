"""Thresholds that meet a budget, from the quantiles of the scores on calibration rows.

    share_k(u) = b_k u / (b_k u + (1 - b_k)(1 - u))         u in [0, 1]

is the share of tokens that threshold k keeps: the trained share b_k for u = 1/2, none for u = 0 and all for u = 1. The
log odds of all shares change by the same amount, so that a block which keeps more tokens than another does so at every
u. A threshold is the quantile of the scores that keeps this share. Scores depend on what earlier blocks skip, so
thresholds are set and observed again until nothing changes.

Shape letters: N tokens that reached a block.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from skipstone.budget.budget_table import BudgetTable, OperatingPoint
from skipstone.budget.handles import ThresholdHandle, require_handles
from skipstone.core.progress_bar import advance, work
from skipstone.measure.share import Seen, observe
from skipstone.model.causal_lm import SkipstoneForCausalLM

Rows = Tensor | Sequence[Mapping[str, Tensor]]

BATCH = 8  # rows a pass
SETTINGS = 6  # of the thresholds for one u; later blocks depend on earlier ones
SETTLED = 0.005  # thresholds are left alone once the share changes by less than this, relative to itself
STEP = 1.08  # of two neighbouring points the larger share is at most this times the smaller one
HALVINGS = 12  # of the interval between two points; scores cannot separate what is still apart then
LEAST = 0.01  # a threshold that keeps nearly no or nearly every token as trained is taken to be this far from it
PARTS, UNIT = 1 << 10, "parts of the range"  # in which progress is told
WITHIN = 0.01  # `meet` is content this close to the budget, as a share of it


def calibrate(model: SkipstoneForCausalLM, rows: Rows, text: str = "") -> BudgetTable:
    """Measure which thresholds make a model meet which FLOP budget, and return them as a table.

    The model runs over the rows many times with decisions as in generation, and is restored afterwards. rows: text to
    measure on, and not the text of a later evaluation: token ids, int64 [rows, tokens], or a sequence of keyword
    arguments of the model's forward, each a batch of rows of the same length. text: a description of the rows, stored
    in the table. Raises ValueError for no rows, for a model without a threshold that can be set, and for decisions that
    need later tokens.
    """
    handles, batches = require_handles(model), _batches(model, rows)
    with _left_as_it_was(model, handles), work(PARTS, UNIT):
        path = _Path(model, handles, batches)
        first, last = path.point(0.0), path.point(1.0)
        inner = [*_between(path, 0.0, first, 0.5, path.trained), (0.5, path.trained)]
        inner += _between(path, 0.5, path.trained, 1.0, last)
        points = (first, *(point for _, point in inner), last)
    return BudgetTable(
        handles=tuple(handle.name for handle in handles),
        trained=tuple(tuple(handle.state()) for handle in handles),
        points=points,
        tokens=batches[0]["input_ids"].shape[1],
        rows=sum(len(batch["input_ids"]) for batch in batches),
        text=text,
    )


def meet(
    model: SkipstoneForCausalLM, handles: Sequence[ThresholdHandle], rows: Sequence[Mapping[str, Tensor]], needed: float
) -> None:
    """Set the thresholds so that the model needs `needed` forward FLOPs per token on `rows`, as nearly as possible.

    Decisions are made as in generation. handles: the thresholds to set, all of the model's. rows: batches as keyword
    arguments of forward, on the model's device. The search ends within 1 % of `needed`, or after 12 halvings of the
    range.
    """
    path, low, high, place = _Path(model, handles, rows), 0.0, 1.0, 0.5
    found = path.seen
    for _ in range(HALVINGS):
        if abs(found.needed / needed - 1) <= WITHIN:
            return
        low, high = (place, high) if found.needed < needed else (low, place)
        place = (low + high) / 2
        found = path.go(place)


class _Path:
    """The path of thresholds from u = 0, no token kept, through the model as trained to u = 1, every token kept.

    u is the variable of the formula at the head of this file. model: the model. handles: its thresholds. rows: the
    calibration batches. seen: the decisions at the current thresholds. base: the share of tokens that each threshold
    kept as trained. trained: the operating point as trained.
    """

    def __init__(
        self, model: SkipstoneForCausalLM, handles: Sequence[ThresholdHandle], rows: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.model, self.handles, self.rows = model, handles, rows
        self.seen = observe(model, rows, handles)
        self.base = [min(max(kept, LEAST), 1 - LEAST) for kept in self.seen.kept]
        self.trained = self._here(self.seen)

    def point(self, place: float) -> OperatingPoint:
        return self._here(self.go(place))

    def go(self, place: float) -> Seen:
        """Set the thresholds for a place u on the path, from 0 to 1, and return the decisions on the rows."""
        before = math.inf
        for _ in range(SETTINGS):
            for handle, base, score_N in zip(self.handles, self.base, self.seen.scores, strict=True):
                share = base * place / (base * place + (1 - base) * (1 - place))
                if len(score_N):
                    handle.set(quantile(score_N, 1 - share))
            self.seen = observe(self.model, self.rows, self.handles)
            if abs(self.seen.share - before) <= SETTLED * self.seen.share:
                break
            before = self.seen.share
        return self.seen

    def _here(self, seen: Seen) -> OperatingPoint:
        return OperatingPoint(
            share=seen.share, thresholds=tuple(handle.threshold for handle in self.handles), kept=tuple(seen.kept)
        )


def _between(
    path: _Path, low: float, one: OperatingPoint, high: float, other: OperatingPoint, depth: int = 0
) -> list[tuple[float, OperatingPoint]]:
    """Return operating points between two, with their places u, so close that thresholds can be interpolated linearly.

    low, high: the places u of the two points, `one` and `other`, which are not returned. depth: how often the range was
    halved.
    """
    if other.share <= one.share * STEP or depth == HALVINGS:
        advance(UNIT, round(PARTS * high) - round(PARTS * low), f"thresholds for {other.share:.1%} of the dense FLOPs")
        return []
    place = (low + high) / 2
    point = path.point(place)
    below = _between(path, low, one, place, point, depth + 1)
    return [*below, (place, point), *_between(path, place, point, high, other, depth + 1)]


def quantile(score_N: Tensor, share: float) -> float:
    """Return a threshold with the share `share` of the scores at or below it.

    score_N: scores of N tokens, at least one. share: from 0 to 1; for 0 and 1 the threshold lies well below and above
    all scores.
    """
    ordered = score_N.double().sort().values
    at = round(share * len(ordered))
    margin = float(ordered[-1] - ordered[0]) or 1.0
    if at == 0:
        return float(ordered[0]) - margin
    if at == len(ordered):
        return float(ordered[-1]) + margin
    return float(ordered[at - 1] + ordered[at]) / 2


def _batches(model: SkipstoneForCausalLM, rows: Rows) -> list[dict[str, Tensor]]:
    if isinstance(rows, Tensor):
        if rows.dim() != 2 or rows.is_floating_point():
            raise ValueError(f"rows must be token ids, int64 [rows, tokens], got {rows.dtype} {list(rows.shape)}")
        rows = [{"input_ids": part} for part in rows.split(BATCH)]
    if not len(rows) or not rows[0]["input_ids"].numel():
        raise ValueError("a calibration needs rows of text, got none")
    return [{name: x.to(model.device) for name, x in row.items()} for row in rows]


@contextmanager
def _left_as_it_was(model: SkipstoneForCausalLM, handles: Sequence[ThresholdHandle]) -> Iterator[None]:
    training, before = model.training, [handle.state() for handle in handles]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for handle, state in zip(handles, before, strict=True):
            handle.restore(state)
