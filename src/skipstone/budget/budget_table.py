"""`BudgetTable`: the thresholds of a model for every FLOP budget in its range."""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from skipstone.budget.handles import ThresholdHandle, find_handles
from skipstone.core.atomic_write import check_writable, write_whole
from skipstone.core.sealed import read_sealed, sealed
from skipstone.core.strict import from_dict
from skipstone.model.causal_lm import SkipstoneForCausalLM

FILE = "budget.json"
LEGACY = "dial.json"  # what versions before 0.2 wrote, read where there is no FILE
LEGACY_KEYS = {"knobs": "handles", "stops": "points", "lines": "thresholds"}
ROUNDING = 0.001  # of shares to three decimals, inwards
GAP = 1.1  # between points further apart than this no budget is promised

LARGEST_SHARE = 100  # of the dense FLOPs: no mechanism costs so much


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """A set of thresholds, and the share of the dense model's FLOPs that the model executes with it.

    share: forward FLOPs per token as a share of the dense model's, measured with these thresholds. thresholds: one
    for each name in `BudgetTable.handles`; tokens whose score is above it are kept. kept: for each threshold, the share
    that it keeps of the tokens that reach its blocks, from 0 to 1.
    """

    share: float
    thresholds: tuple[float, ...]
    kept: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class BudgetTable:
    """The thresholds of one model for every FLOP budget that it can meet, as a list of measured points.

    A budget is a share of the dense model's forward FLOPs per token, when tokens are skipped as in generation and rows
    run one at a time. Between two points, thresholds are interpolated linearly. handles: names of the thresholds, such
    as "3 mod". trained: each threshold's state after training (`ScoreThreshold.state`, None for an option that was not
    set), by which `reset` restores it. points: the measured points, from the smallest to the largest share. tokens,
    rows: tokens per row and number of rows of the calibration text. text: a description of that text.
    """

    handles: tuple[str, ...]
    trained: tuple[tuple[float | None, ...], ...]
    points: tuple[OperatingPoint, ...]
    tokens: int
    rows: int
    text: str = ""

    def __post_init__(self) -> None:
        for point in self.points:
            if not all(map(math.isfinite, (point.share, *point.thresholds))) or not 0 <= point.share <= LARGEST_SHARE:
                raise ValueError(
                    f"points must have finite thresholds and shares from 0 to {LARGEST_SHARE}, got {point}"
                )
            if len(point.thresholds) != len(self.handles):
                raise ValueError(f"points must have a threshold for each of {len(self.handles)} handles, got {point}")
        if not self.points:
            raise ValueError("points must not be empty")

    def __str__(self) -> str:
        low, high = self.range
        text = f" of {self.text}" if self.text else ""
        return f"budgets from {low:g} to {high:g}, calibrated on {self.rows} rows of {self.tokens} tokens{text}"

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest budget, as shares of the dense FLOPs, rounded inwards to three decimals."""
        low, high = self.points[0].share, self.points[-1].share
        return math.ceil(low * 1000 - 1e-9) / 1000, math.floor(high * 1000 + 1e-9) / 1000

    def thresholds(self, budget: float) -> list[float]:
        """Return the thresholds that meet a budget, one per entry of `handles`, interpolated between two points.

        These are the measured points with the nearest smaller and larger share. budget: share of the dense FLOPs.
        Raises ValueError for a budget outside of `range`, and for one between two points of which the larger share is
        more than 1.1 times the smaller, because the scores do not tell tokens apart there. A budget that equals one of
        the two shares but for rounding to three decimals gets the thresholds of that point.
        """
        low, high = self.range
        if not low <= budget <= high:
            raise ValueError(
                f"budget {budget:g} is out of reach: this model can execute from {low:g} to {high:g} of its dense "
                f"FLOPs a token (rows of {self.tokens} tokens)"
            )
        one, other = next((a, b) for a, b in pairwise(self.points) if a.share <= budget <= b.share)
        if other.share > one.share * GAP:
            nearest = min(one, other, key=lambda point: abs(point.share - budget))
            if abs(nearest.share - budget) <= ROUNDING:
                return list(nearest.thresholds)
            raise ValueError(
                f"budget {budget:g} cannot be met: the scores do not distinguish tokens between "
                f"{max(one.share, low):.3f} and {min(other.share, high):.3f} of the dense FLOPs; take one of these"
            )
        part = (budget - one.share) / (other.share - one.share) if other.share > one.share else 0.0
        return [(1 - part) * a + part * b for a, b in zip(one.thresholds, other.thresholds, strict=True)]

    def set(self, model: SkipstoneForCausalLM, budget: float) -> None:
        """Set the model's thresholds so that it meets a budget, until `reset`.

        budget: share of the dense FLOPs. Raises ValueError for a budget outside of `range`, for one between two points
        of which the larger share is more than 1.1 times the smaller, and for another model: one whose thresholds are
        not those named in `handles`.
        """
        thresholds = self.thresholds(budget)
        for handle, threshold in zip(self._handles(model), thresholds, strict=True):
            handle.set(threshold)

    def reset(self, model: SkipstoneForCausalLM) -> None:
        """Restore every threshold of the model exactly as it was trained.

        Raises ValueError for another model: one whose thresholds are not those named in `handles`.
        """
        for handle, state in zip(self._handles(model), self.trained, strict=True):
            handle.restore(list(state))

    @contextmanager
    def at(self, model: SkipstoneForCausalLM, budget: float) -> Iterator[None]:
        """Set the model to a budget inside a `with` block, and restore its thresholds afterwards.

        model: the model whose thresholds the table holds. budget: share of the dense FLOPs. Raises ValueError for a
        budget outside of `range`, for one between two points of which the larger share is more than 1.1 times the
        smaller, and for another model: one whose thresholds are not those named in `handles`.
        """
        before = [(handle, handle.state()) for handle in self._handles(model)]
        try:
            self.set(model, budget)
            yield
        finally:
            for handle, state in before:
                handle.restore(state)

    def current_share(self, model: SkipstoneForCausalLM) -> float:
        """Return the budget that the model's current thresholds meet, roughly: the share of the nearest point.

        The nearest point is the one whose thresholds differ least from the current ones, by their largest difference.
        For a model as it was trained, this is exactly the share of the dense FLOPs that calibration measured for it.
        Raises ValueError for another model: one whose thresholds are not those named in `handles`.
        """
        now = [handle.threshold for handle in self._handles(model)]
        apart = [max(abs(a - b) for a, b in zip(point.thresholds, now, strict=True)) for point in self.points]
        return self.points[apart.index(min(apart))].share

    def _handles(self, model: SkipstoneForCausalLM) -> list[ThresholdHandle]:
        handles = find_handles(model)
        if tuple(handle.name for handle in handles) != self.handles:
            found = ", ".join(handle.name for handle in handles) or "no thresholds"
            raise ValueError(
                f"this budget table belongs to another model: it sets {', '.join(self.handles)}, here are {found}"
            )
        return handles

    def save(self, folder: str | Path) -> Path:
        """Write the table as budget.json into `folder`, where the model's weights are, and return the path.

        Raises FileExistsError if there is a table already, and OSError or `WriteError` (a ValueError) if the file
        cannot be written.
        """
        path = self.free_path(folder)
        write_whole(path, json.dumps(sealed(asdict(self)), indent=1) + "\n")
        return path

    @staticmethod
    def find(folder: str | Path) -> Path | None:
        """Return the path of the table in `folder`; None if there is none.

        The file is budget.json, or dial.json if a release before 0.2 wrote it.
        """
        return next((path for name in (FILE, LEGACY) if (path := Path(folder) / name).is_file()), None)

    @classmethod
    def free_path(cls, folder: str | Path) -> Path:
        """Return the path that `save` would write in `folder`, after checking that it may be written.

        Raises FileExistsError if there is a table already, and OSError or `WriteError` (a ValueError) if no file can be
        created there.
        """
        if (path := cls.find(folder)) is not None:
            raise FileExistsError(f"{str(path)!r} exists already; nothing is overwritten; remove it to calibrate again")
        check_writable(Path(folder) / FILE)
        return Path(folder) / FILE

    @classmethod
    def of(cls, model: SkipstoneForCausalLM) -> BudgetTable:
        """Read the table of thresholds by FLOP budget from the folder that `model` was loaded from.

        Warns if adapters were added to the model, because the table was measured without them. Raises FileNotFoundError
        if the folder has no table, `Damaged` (a ValueError) if the table's text does not have the hash that it names,
        and ValueError if it cannot be read.
        """
        table = cls.load(model.name_or_path)
        if getattr(model, "peft_config", None):
            warnings.warn(
                f"{FILE} of {model.name_or_path!r} was measured without the model's adapters; calibrate the adapted "
                "model and pass the table as budget_table",
                stacklevel=4,
            )
        return table

    @classmethod
    def load(cls, folder: str | Path) -> BudgetTable:
        """Read the budget table that `save` wrote into `folder`: budget.json, or dial.json of a release before 0.2.

        Raises FileNotFoundError if there is none, `Damaged` (a ValueError) if its text does not have the hash that it
        names, and ValueError if it cannot be read.
        """
        if not str(folder):  # of a model that was not loaded; the working directory may hold one of another model
            raise FileNotFoundError(f"a budget needs {FILE}, and the model was not loaded from a folder that has one")
        path = cls.find(folder)
        if path is None:
            raise FileNotFoundError(
                f"{str(folder)!r} has no {FILE}, which a budget needs: `skipstone calibrate` writes it"
            )
        values = read_sealed(path)
        return from_dict(cls, _of_today(values) if path.name == LEGACY else values, path.name)


def _of_today(values: object) -> Any:
    """Return the values of a legacy file under the current names."""
    if isinstance(values, Mapping):
        return {LEGACY_KEYS.get(key, key): _of_today(value) for key, value in values.items()}
    return [_of_today(value) for value in values] if isinstance(values, list) else values
