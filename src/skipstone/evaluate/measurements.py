"""Everything that `compare` measures of one run, and what training left to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.evaluate.counting import Executed, count
from skipstone.evaluate.losses import measure
from skipstone.evaluate.memory import CacheBytes, cache_bytes
from skipstone.evaluate.opened import Opened, batches
from skipstone.evaluate.overhead import Overhead, overhead
from skipstone.evaluate.speed import Rate, Task, decode_task, prefill_task
from skipstone.evaluate.statistics import Statistics

ROWS, SAMPLE = 8, 32  # rows a batch; rows on which capacity is measured
DECODE_BATCHES = (1, 8)
NEW_TOKENS = 32  # at most, while decoding is timed


@dataclass(frozen=True, kw_only=True, eq=False)
class Measurements:
    """Figures of one run. result: what training wrote, empty for a saved model. rates: by "prefill", "decode 1", ...

    accuracy: by bin of the known difficulty. None, or missing, is what cannot be measured or is not known.
    """

    name: str
    parameters: int
    way: str
    context: int
    executed: Executed
    layers: list[dict[str, dict[str, Any]]]
    cache: CacheBytes | None
    overhead: Overhead
    result: Mapping[str, Any]
    rates: Mapping[str, Rate]
    accuracy: Mapping[str, float] | None

    def to_dict(self) -> dict[str, Any]:
        rates = {
            name: {
                "tokens_per_second": rate.tokens_per_second,
                "spread": rate.spread,
                "each": rate.each,
                "joules_per_token": rate.joules_per_token,
            }
            for name, rate in self.rates.items()
        }
        return {
            "run": self.name,
            "parameters": self.parameters,
            "decided": self.way,
            "context": self.context,
            "flops_per_token": vars(self.executed) | {"agree": self.executed.agree},
            "layers": self.layers,
            "cache_bytes_per_token": None if self.cache is None else vars(self.cache),
            "training_overhead": vars(self.overhead),
            "training": dict(self.result),
            "speed": rates,
            "accuracy": None if self.accuracy is None else dict(self.accuracy),
        }


def sample_ids(opened: Opened, rows: int, length: int, others: Opened | None = None) -> Tensor:
    """int64 [rows, length]: beginnings of evaluation rows; else of those of `others` if they fit, else random."""
    vocabulary = opened.model.config.vocab_size
    for source in (opened, others):
        if source is not None and source.data is not None and source.data.vocab_size <= vocabulary:
            items = (source.data.validation[i]["input_ids"] for i in range(min(rows, len(source.data.validation))))
            full = [ids[:length] for ids in items if len(ids) >= length]
            if full:
                return torch.stack([full[i % len(full)] for i in range(rows)]).to(opened.model.device)
    drawn = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(opened.model.device)


def speed_tasks(opened: Opened, ids_BT: Tensor) -> dict[str, Task]:
    """What is timed, on rows of one length for all runs, the first half of them the prompt; nothing without a cache."""
    if "executed" not in opened.ways:
        return {}
    half = max(ids_BT.shape[1] // 2, 1)
    new = min(NEW_TOKENS, half)
    decoding = {f"decode {rows}": decode_task(opened.model, ids_BT[:rows, :half], new) for rows in DECODE_BATCHES}
    return {"prefill": prefill_task(opened.model, ids_BT[:1]), **decoding}


def measurements(opened: Opened, others: Opened | None, rates: Mapping[str, Rate]) -> Measurements:
    """All but the speeds, which all runs take in turns. Raises ValueError for a model that cannot run by itself."""
    model, way = opened.model, opened.main
    ids_BT = sample_ids(opened, ROWS, opened.context, others)
    taught = opened.ways.get("oracle", way)
    statistics = Statistics(model, activation_rows=0)
    sample = _sample(opened, ids_BT)
    for batch in sample:
        statistics.add(way.run(model, batch, output_records=True).records or ())
    return Measurements(
        name=opened.run.name,
        parameters=model.num_parameters(),
        way=way.name,
        context=opened.context,
        executed=count(model, way, sample[:1]),
        layers=statistics.layers(),
        cache=cache_bytes(model, ids_BT) if "executed" in opened.ways else None,
        overhead=overhead(model, taught, sample[0]),
        result=opened.run.result() if opened.run.finished and not opened.run.is_saved_model else {},
        rates=rates,
        accuracy=_accuracy(opened),
    )


def _sample(opened: Opened, ids_BT: Tensor) -> list[dict[str, Tensor]]:
    if opened.data is None:
        return [{"input_ids": ids_BT}]
    return list(batches(opened.data, ROWS, opened.model.device, rows=SAMPLE))


def _accuracy(opened: Opened) -> Mapping[str, float] | None:
    """On all evaluation rows, where the data know the difficulty."""
    if opened.data is None or not opened.data.config.tells_difficulty:
        return None
    rows = batches(opened.data, ROWS * 4, opened.model.device)
    return measure(opened.model, opened.main, rows, activations=False).accuracy
