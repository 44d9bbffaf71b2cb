"""FLOPs and loss of one model at several budgets, and its budget table, measured on a run's text.

A budget is a share of the dense model's forward FLOPs; the table holds the routing thresholds that meet each budget.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from skipstone.budget import BudgetTable, calibrate
from skipstone.budget.budget_table import OperatingPoint
from skipstone.core.strict import PlainDict
from skipstone.data.prepare import PreparedData, prepare
from skipstone.data.rows import Row
from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.evaluate.tables import UNKNOWN, OneTable, Section, amount, number, percent, plain
from skipstone.measure.flops import COUNTED_BATCHES, flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.share import observe

ROWS = 32  # to calibrate on
BATCH = 8


@dataclass(frozen=True, kw_only=True)
class AtBudget:
    """Figures of a model at one budget, which is a share of the dense model's forward FLOPs.

    target: the requested budget; None means the model as trained. realised: the share of the dense FLOPs that the
    decisions on the whole split need, if each row is computed by itself. flops_per_token: the forward FLOPs per token
    that these decisions need. counted_per_token: FLOPs per token that were counted while the first 4 batches ran, in
    which rows that keep fewer tokens are padded. loss: the loss of the pass that really skips blocks, in nats per
    prediction.
    """

    target: float | None
    realised: float
    flops_per_token: float
    counted_per_token: float
    loss: float


def at_budgets(
    loaded: LoadedRun, data: PreparedData, budget_table: BudgetTable, budgets: Iterable[float], batch_size: int
) -> tuple[AtBudget, ...]:
    """Measure FLOPs and loss of a model as trained and then at each of `budgets`, and return one `AtBudget` for each.

    loaded: the run, whose model is measured. data: its validation rows are read. budget_table: the model's thresholds
    for every budget. budgets: shares of the dense model's forward FLOPs. batch_size: rows of a pass. Raises ValueError
    for a budget that the table cannot meet.
    """
    return tuple(_measured(loaded, data, budget_table, target, batch_size) for target in (None, *budgets))


def _measured(
    loaded: LoadedRun, data: PreparedData, budget_table: BudgetTable, target: float | None, batch_size: int
) -> AtBudget:
    model, forward = loaded.model, loaded.passes["executed"]

    def rows(most: int | None = None) -> Iterator[dict[str, torch.Tensor]]:
        return batches(data, batch_size, model.device, most)

    with nullcontext() if target is None else budget_table.at(model, target):
        seen = observe(model, rows())
        return AtBudget(
            target=target,
            realised=seen.share,
            flops_per_token=seen.needed,
            counted_per_token=flop_check(model, forward, rows(COUNTED_BATCHES * batch_size)).counted,
            loss=measure_loss(model, forward, rows(), activations=False).loss,
        )


def budget_section(points: Sequence[AtBudget], budget_table: str) -> Section:
    """Tabulate share of FLOPs, FLOPs per token and loss at each budget.

    points: the rows of the table. budget_table: a description of the thresholds' source, for the note below the table.
    """
    return Section(
        title="loss by budget, executed",
        columns=["budget", "share of dense FLOPs", "off by", "FLOPs a token", "counted in batches", "loss (nats)"],
        rows=[
            [
                "as trained" if p.target is None else percent(p.target),
                percent(p.realised),
                UNKNOWN if p.target is None else f"{100 * (p.realised / p.target - 1):+.1f} %",
                amount(p.flops_per_token),
                amount(p.counted_per_token),
                number(p.loss),
            ]
            for p in points
        ],
        notes=[f"{budget_table}; one row at a time, except FLOPs counted in batches, where shorter rows are padded"],
    )


def table_of(loaded: LoadedRun, split: str) -> BudgetTable:
    """Return the thresholds for every FLOP budget: those stored beside the weights, or else newly measured ones.

    loaded: the run. split: the split that will be evaluated; new thresholds are measured on the split `train`, or on
    `validation` if `split` is `train`.
    """
    folder = loaded.run.model_folder()
    if BudgetTable.find(folder) is not None:
        return BudgetTable.load(folder)
    return _calibrated(loaded, "validation" if split == "train" else "train", ROWS)


@dataclass(frozen=True, kw_only=True)
class Calibrated(OneTable):
    """A measured budget table (routing thresholds for every FLOP budget) and the file to which it was written.

    path: the file. budget_table: the table.
    """

    path: Path
    budget_table: BudgetTable

    def to_dict(self) -> PlainDict:
        """Return plain values for JSON.

        The keys are "path", "range" ([least, largest] budget) and "points": for each measured operating point a dict
        with "share" (of the dense FLOPs), "thresholds" and "kept" (the share of tokens that each threshold keeps).
        """
        return plain(
            {
                "path": str(self.path),
                "range": self.budget_table.range,
                "points": [vars(p) for p in self.budget_table.points],
            }
        )

    def section(self) -> Section:
        return Section(
            title=str(self.path),
            columns=["share of dense FLOPs", "tokens kept, mean", "least", "most"],
            rows=[
                [percent(s.share), *map(percent, (sum(s.kept) / len(s.kept), min(s.kept), max(s.kept)))]
                for s in _shown(self.budget_table.points)
            ],
            notes=[f"mean, least and most of {', '.join(self.budget_table.handles)}", str(self.budget_table)],
        )


def calibrate_run(
    folder: Path, *, corpus: str | None = None, context: int | None = None, rows: int = ROWS
) -> Calibrated:
    """Measure which thresholds meet which FLOP budget for a run or saved model, and write them to budget.json.

    folder: the folder of the run or saved model. The file is written beside the weights. corpus: name of the corpus to
    measure on, such as "enwik8". context: tokens of a row. For both, None means the run's own (a saved model has no
    corpus). rows: number of training rows to measure on. Returns the thresholds as a table, and the path of the file.
    Raises FileExistsError if there is a budget table already, ValueError without a corpus and for a model that has no
    threshold to set, and FileNotFoundError for a folder or a corpus that does not exist.
    """
    loaded = load_run(folder, "train", corpus, context)
    where = loaded.run.model_folder()
    BudgetTable.free_path(where)
    if loaded.data is None:
        raise ValueError(f"{folder} is a saved model without a recipe; name the corpus to calibrate on")
    budget_table = _calibrated(loaded, "train", rows)
    return Calibrated(path=budget_table.save(where), budget_table=budget_table)


def _calibrated(loaded: LoadedRun, split: str, count: int) -> BudgetTable:
    assert loaded.data is not None
    found = list(spread(loaded, split, count))
    return calibrate(loaded.model, found, text=f"{loaded.data.config.corpus}, {split}")


def spread(loaded: LoadedRun, split: str, count: int) -> Iterator[Row]:
    """Yield batches of up to 8 rows, which are spread evenly over a split of a run's data.

    A batch is a dict of int64 tensors [rows, tokens] by name, such as "input_ids". The last row of the split is left
    out, as it may be short. loaded: the run. split: "train" or "validation". count: number of rows in all; if the split
    has fewer, all of them are read.
    """
    assert loaded.data is not None
    config = replace(loaded.data.config, validation_rows=None)
    data = prepare(config, tokenizer=loaded.run.load_tokenizer(), train=False, split=split)
    whole = len(data.validation) - 1 or 1  # the last row may be short
    places = [i * whole // count for i in range(count)] if count < whole else list(range(whole))
    for start in range(0, len(places), BATCH):
        yield data.collate(data.validation.__getitems__(places[start : start + BATCH]))


def _shown(points: Sequence[OperatingPoint], most: int = 12) -> list[OperatingPoint]:
    """Return at most `most` of the points, evenly spaced, with the first and the last."""
    count = min(most, len(points))
    return [points[round(i * (len(points) - 1) / max(count - 1, 1))] for i in range(count)]
