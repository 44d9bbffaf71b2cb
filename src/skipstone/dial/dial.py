"""`Dial`: the thresholds of a model for every budget in its reach."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

from skipstone.core.strict import from_dict
from skipstone.dial.knobs import Knob, find_knobs
from skipstone.model.causal_lm import SkipstoneForCausalLM

FILE = "dial.json"
GAP = 1.1  # between stops further apart than this no budget is promised


@dataclass(frozen=True, kw_only=True)
class Stop:
    """share: of the dense FLOPs a token, measured with these `lines`. kept: the share of tokens that each lets pass."""

    share: float
    lines: tuple[float, ...]
    kept: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Dial:
    """Stops from the least to the most that a model can execute; between two of them thresholds move in straight lines.

    A budget is the share of the dense model's forward FLOPs a token, of causal passes over one row at a time.
    knobs: names of the thresholds. trained: their state as trained. tokens, rows: of the calibration; text: what it
    was.
    """

    knobs: tuple[str, ...]
    trained: tuple[tuple[float | None, ...], ...]
    stops: tuple[Stop, ...]
    tokens: int
    rows: int
    text: str = ""

    def __str__(self) -> str:
        low, high = self.reach
        text = f" of {self.text}" if self.text else ""
        return f"budgets from {low:g} to {high:g}, calibrated on {self.rows} rows of {self.tokens} tokens{text}"

    @property
    def reach(self) -> tuple[float, float]:
        """The least and the largest budget, to three digits."""
        low, high = self.stops[0].share, self.stops[-1].share
        return math.ceil(low * 1000 - 1e-9) / 1000, math.floor(high * 1000 + 1e-9) / 1000

    def lines(self, budget: float) -> list[float]:
        """The threshold of each knob. Raises ValueError, naming the reach, for a budget outside of it."""
        low, high = self.reach
        if not low <= budget <= high:
            raise ValueError(
                f"budget {budget:g} is out of reach: this model can execute from {low:g} to {high:g} of its dense "
                f"FLOPs a token (rows of {self.tokens} tokens)"
            )
        one, other = next((a, b) for a, b in pairwise(self.stops) if a.share <= budget <= b.share)
        if other.share > one.share * GAP:
            raise ValueError(
                f"budget {budget:g} cannot be met: the scores tell no tokens apart between {one.share:.3f} and "
                f"{other.share:.3f} of the dense FLOPs; take one of these"
            )
        way = (budget - one.share) / (other.share - one.share) if other.share > one.share else 0.0
        return [(1 - way) * a + way * b for a, b in zip(one.lines, other.lines, strict=True)]

    def set(self, model: SkipstoneForCausalLM, budget: float) -> None:
        """Turn the model's thresholds to this budget, until `reset`. Raises ValueError as `lines` does, and for another
        model than the one that was calibrated."""
        lines = self.lines(budget)
        for knob, line in zip(self._knobs(model), lines, strict=True):
            knob.turn(line)

    def reset(self, model: SkipstoneForCausalLM) -> None:
        """Every threshold as it was trained, to the bit."""
        for knob, state in zip(self._knobs(model), self.trained, strict=True):
            knob.restore(list(state))

    @contextmanager
    def at(self, model: SkipstoneForCausalLM, budget: float) -> Iterator[None]:
        """Inside, the model is set to the budget; afterwards it is as it was before."""
        before = [(knob, knob.state()) for knob in self._knobs(model)]
        try:
            self.set(model, budget)
            yield
        finally:
            for knob, state in before:
                knob.restore(state)

    def _knobs(self, model: SkipstoneForCausalLM) -> list[Knob]:
        knobs = find_knobs(model)
        if tuple(knob.name for knob in knobs) != self.knobs:
            found = ", ".join(knob.name for knob in knobs) or "no thresholds"
            raise ValueError(f"this dial belongs to another model: it turns {', '.join(self.knobs)}, here are {found}")
        return knobs

    def save(self, folder: str | Path) -> Path:
        """Write dial.json beside the weights. Raises FileExistsError where there is one."""
        path = self.refuse(folder)
        path.write_text(json.dumps(asdict(self), indent=1) + "\n", encoding="utf-8")
        return path

    @staticmethod
    def refuse(folder: str | Path) -> Path:
        """Where `save` would write. Raises FileExistsError as it does."""
        path = Path(folder) / FILE
        if path.exists():
            raise FileExistsError(f"{str(path)!r} exists already; nothing is overwritten, remove it to calibrate anew")
        return path

    @classmethod
    def load(cls, folder: str | Path) -> Dial:
        """What `save` wrote. Raises FileNotFoundError where nothing was, ValueError for what cannot be read."""
        path = Path(folder) / FILE
        if not path.is_file():
            raise FileNotFoundError(
                f"{str(folder)!r} has no {FILE}, which a budget needs: `skipstone calibrate` writes it"
            )
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error}") from None
        return from_dict(cls, values, FILE)
