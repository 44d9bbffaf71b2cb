"""One model at several budgets: what it executes and what it loses. And the dial that sets it, from a run's text."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from skipstone.data.prepare import PreparedData, prepare
from skipstone.data.rows import Row
from skipstone.dial import Dial, calibrate
from skipstone.dial.dial import FILE, Stop
from skipstone.dial.share import observe
from skipstone.evaluate.counting import COUNTED_BATCHES, count
from skipstone.evaluate.losses import measure
from skipstone.evaluate.opened import Opened, batches, open_run
from skipstone.evaluate.tables import UNKNOWN, Section, amount, markdown, number, percent, plain, rich_table

if TYPE_CHECKING:
    from rich.table import Table

ROWS = 32  # to calibrate on
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class AtBudget:
    """asked: the budget, None for the model as trained. realised: the share of the dense FLOPs that the decisions of
    the whole split need, one row at a time. flops_per_token: these FLOPs. counted_per_token: those of the operations
    that ran on the first batches, shorter rows filled up. loss: nats a prediction of the executed pass."""

    asked: float | None
    realised: float
    flops_per_token: float
    counted_per_token: float
    loss: float


def at_budgets(
    opened: Opened, data: PreparedData, dial: Dial, budgets: Iterable[float], batch_size: int
) -> tuple[AtBudget, ...]:
    """The model as trained, then at each budget."""
    return tuple(_measured(opened, data, dial, asked, batch_size) for asked in (None, *budgets))


def _measured(opened: Opened, data: PreparedData, dial: Dial, asked: float | None, batch_size: int) -> AtBudget:
    model, way = opened.model, opened.ways["executed"]

    def rows(most: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        return batches(data, batch_size, model.device, most)

    with nullcontext() if asked is None else dial.at(model, asked):
        seen = observe(model, rows())
        return AtBudget(
            asked=asked,
            realised=seen.share,
            flops_per_token=seen.needed,
            counted_per_token=count(model, way, rows(COUNTED_BATCHES * batch_size)).counted,
            loss=measure(model, way, rows(), activations=False).loss,
        )


def budget_section(points: Sequence[AtBudget], dial: str) -> Section:
    return Section(
        title="loss by budget, executed",
        columns=["budget", "share of dense FLOPs", "off by", "FLOPs a token", "counted in batches", "loss (nats)"],
        rows=[
            [
                "as trained" if p.asked is None else percent(p.asked),
                percent(p.realised),
                UNKNOWN if p.asked is None else f"{100 * (p.realised / p.asked - 1):+.1f} %",
                amount(p.flops_per_token),
                amount(p.counted_per_token),
                number(p.loss),
            ]
            for p in points
        ],
        notes=[f"{dial}; rows one at a time, but for the FLOPs counted in batches, where shorter rows are filled up"],
    )


def dial_of(opened: Opened, split: str) -> Dial:
    """The dial beside the weights, or one made from text that is not in `split`."""
    folder = opened.run.model_folder()
    if (folder / FILE).is_file():
        return Dial.load(folder)
    return _calibrated(opened, "validation" if split == "train" else "train", ROWS)


@dataclass(frozen=True, kw_only=True)
class Calibrated:
    """A dial that was made and written to `path`."""

    path: Path
    dial: Dial

    def to_dict(self) -> dict[str, Any]:
        return plain({"path": str(self.path), "reach": self.dial.reach, "stops": [vars(s) for s in self.dial.stops]})

    def markdown(self) -> str:
        return markdown([self._section()])

    def table(self) -> Table:
        return rich_table([self._section()])

    def _section(self) -> Section:
        return Section(
            title=str(self.path),
            columns=["share of dense FLOPs", "tokens kept, mean", "least", "most"],
            rows=[
                [percent(s.share), *map(percent, (sum(s.kept) / len(s.kept), min(s.kept), max(s.kept)))]
                for s in _shown(self.dial.stops)
            ],
            notes=[f"mean, least and most of {', '.join(self.dial.knobs)}", str(self.dial)],
        )


def calibrate_run(
    folder: Path, *, corpus: str | None = None, context: int | None = None, rows: int = ROWS
) -> Calibrated:
    """Make the dial of a run or a saved model from `rows` training rows, and write it beside the weights.

    corpus, context: replace those of the run; a saved model has none. Raises FileExistsError where there is a dial,
    ValueError without text, and for a model whose thresholds no budget can turn.
    """
    opened = open_run(folder, "train", corpus, context)
    where = opened.run.model_folder()
    Dial.refuse(where)
    if opened.data is None:
        raise ValueError(f"{folder} is a saved model without a recipe; name the corpus to calibrate on")
    dial = _calibrated(opened, "train", rows)
    return Calibrated(path=dial.save(where), dial=dial)


def _calibrated(opened: Opened, split: str, count: int) -> Dial:
    assert opened.data is not None
    found = list(_spread(opened, split, count))
    return calibrate(opened.model, found, text=f"{opened.data.config.corpus}, {split}")


def _spread(opened: Opened, split: str, count: int) -> Iterator[Row]:
    """Batches of whole rows, from all over the split."""
    assert opened.data is not None
    config = replace(opened.data.config, validation_rows=None)
    data = prepare(config, tokenizer=opened.run.load_tokenizer(), train=False, split=split)
    whole = len(data.validation) - 1 or 1  # the last row may be short
    places = [i * whole // count for i in range(count)] if count < whole else list(range(whole))
    for start in range(0, len(places), BATCH):
        yield data.collate(data.validation.__getitems__(places[start : start + BATCH]))


def _shown(stops: Sequence[Stop], most: int = 12) -> list[Stop]:
    """From the first to the last, evenly."""
    count = min(most, len(stops))
    return [stops[round(i * (len(stops) - 1) / max(count - 1, 1))] for i in range(count)]
