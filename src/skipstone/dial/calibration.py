"""Thresholds that meet a budget, from the quantiles of the scores on calibration rows.

    share_k(u) = b_k u / (b_k u + (1 - b_k)(1 - u))         u in [0, 1]

is what knob k lets pass: b_k is its share as trained, u = 1/2 gives just that, u = 0 nobody and u = 1 everybody. All
knobs move by the same log odds, so that blocks keep their order. The line is the quantile of the scores that lets this
share pass. Blocks see what those before them leave, so lines are set and looked at anew until nothing changes.

Shape letters: N tokens that were asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor

from skipstone.dial.dial import Dial, Stop
from skipstone.dial.knobs import Knob, require_knobs
from skipstone.dial.share import Seen, observe
from skipstone.model.causal_lm import SkipstoneForCausalLM

Rows = Tensor | Sequence[Mapping[str, Tensor]]

BATCH = 8  # rows a pass
PASSES = 6  # settings of the lines at one place; later blocks answer to earlier ones
SETTLED = 0.005  # lines whose share moves by less than this of itself are left as they are
STEP = 1.08  # of two neighbouring stops the larger share is at most this times the smaller one
HALVINGS = 12  # of the way between two stops; what is still apart then is told apart by no score
LEAST = 0.01  # a knob that lets nearly nobody or everybody pass as trained is taken to be this far from it
WITHIN = 0.01  # `meet` is content this close to the budget, as a share of it


def calibrate(model: SkipstoneForCausalLM, rows: Rows, text: str = "") -> Dial:
    """The dial of a model: thresholds for every budget in its reach. The model is left as it was.

    rows: token ids, int64 [rows, tokens], or a sequence of what forward takes, rows of equal length in batches of any
    size; not the rows that will be evaluated. text: what they are, in words. Raises ValueError for no rows, a model
    without a threshold to turn, and decisions that have no causal form.
    """
    knobs, batches = require_knobs(model), _batches(model, rows)
    with _left_as_it_was(model, knobs):
        path = _Path(model, knobs, batches)
        first, last = path.stop(0.0), path.stop(1.0)
        inner = [*_between(path, 0.0, first, 0.5, path.trained), (0.5, path.trained)]
        inner += _between(path, 0.5, path.trained, 1.0, last)
        stops = (first, *(stop for _, stop in inner), last)
    return Dial(
        knobs=tuple(knob.name for knob in knobs),
        trained=tuple(tuple(knob.state()) for knob in knobs),
        stops=stops,
        tokens=batches[0]["input_ids"].shape[1],
        rows=sum(len(batch["input_ids"]) for batch in batches),
        text=text,
    )


def meet(
    model: SkipstoneForCausalLM, knobs: Sequence[Knob], rows: Sequence[Mapping[str, Tensor]], needed: float
) -> None:
    """Turn the knobs so that causal passes over `rows` need this many FLOPs a token, or as near as they can."""
    path, low, high, place = _Path(model, knobs, rows), 0.0, 1.0, 0.5
    found = path.seen
    for _ in range(HALVINGS):
        if abs(found.needed / needed - 1) <= WITHIN:
            return
        low, high = (place, high) if found.needed < needed else (low, place)
        place = (low + high) / 2
        found = path.go(place)


class _Path:
    """The way from nobody kept over the model as trained to everybody kept.

    seen: what came of the thresholds as they are now. trained: as the model was found.
    """

    def __init__(
        self, model: SkipstoneForCausalLM, knobs: Sequence[Knob], rows: Sequence[Mapping[str, Tensor]]
    ) -> None:
        self.model, self.knobs, self.rows = model, knobs, rows
        self.seen = observe(model, rows, knobs)
        self.base = [min(max(kept, LEAST), 1 - LEAST) for kept in self.seen.kept]
        self.trained = self._here(self.seen)

    def stop(self, place: float) -> Stop:
        return self._here(self.go(place))

    def go(self, place: float) -> Seen:
        """Turn the knobs to a place u, and see what comes of it."""
        before = math.inf
        for _ in range(PASSES):
            for knob, base, score_N in zip(self.knobs, self.base, self.seen.scores, strict=True):
                share = base * place / (base * place + (1 - base) * (1 - place))
                if len(score_N):
                    knob.turn(quantile(score_N, 1 - share))
            self.seen = observe(self.model, self.rows, self.knobs)
            if abs(self.seen.share - before) <= SETTLED * self.seen.share:
                break
            before = self.seen.share
        return self.seen

    def _here(self, seen: Seen) -> Stop:
        return Stop(share=seen.share, lines=tuple(knob.line for knob in self.knobs), kept=tuple(seen.kept))


def _between(path: _Path, low: float, one: Stop, high: float, other: Stop, depth: int = 0) -> list[tuple[float, Stop]]:
    """Stops between two, close enough to each other that a straight line between their thresholds will do."""
    if other.share <= one.share * STEP or depth == HALVINGS:
        return []
    place = (low + high) / 2
    stop = path.stop(place)
    below = _between(path, low, one, place, stop, depth + 1)
    return [*below, (place, stop), *_between(path, place, stop, high, other, depth + 1)]


def quantile(score_N: Tensor, share: float) -> float:
    """A number with this share of the scores at or below it; for 0 and 1 so far outside that others lie inside, too."""
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
def _left_as_it_was(model: SkipstoneForCausalLM, knobs: Sequence[Knob]) -> Iterator[None]:
    training, before = model.training, [knob.state() for knob in knobs]
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        for knob, state in zip(knobs, before, strict=True):
            knob.restore(state)
