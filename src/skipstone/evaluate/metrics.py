"""Everything that `compare` measures of one run, and what training left to be read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.evaluate.loaded_run import LoadedRun, batches
from skipstone.measure.flop_check import FlopCheck, flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.memory import CacheBytes, cache_bytes
from skipstone.measure.overhead import Overhead, overhead
from skipstone.measure.speed import Rate, Task, decode_task, prefill_task
from skipstone.measure.summaries import Statistics

ROWS, SAMPLE = 8, 32  # rows a batch; rows on which capacity is measured
DECODE_BATCHES = (1, 8)
NEW_TOKENS = 32  # at most, while decoding is timed


@dataclass(frozen=True, kw_only=True, eq=False)
class RunMetrics:
    """Figures of one run. result: what training wrote, empty for a saved model. rates: by "prefill", "decode 1", ...

    accuracy: by bin of the known difficulty. None, or missing, is what cannot be measured or is not known.
    """

    name: str
    parameters: int
    pass_name: str
    context: int
    flops: FlopCheck
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
            "decided": self.pass_name,
            "context": self.context,
            "flops_per_token": vars(self.flops) | {"agree": self.flops.agree},
            "layers": self.layers,
            "cache_bytes_per_token": None if self.cache is None else vars(self.cache),
            "training_overhead": vars(self.overhead),
            "training": dict(self.result),
            "speed": rates,
            "accuracy": None if self.accuracy is None else dict(self.accuracy),
        }


def sample_ids(loaded: LoadedRun, rows: int, length: int, others: LoadedRun | None = None) -> Tensor:
    """int64 [rows, length]: beginnings of evaluation rows; else of those of `others` if they fit, else random."""
    vocabulary = loaded.model.config.vocab_size
    for source in (loaded, others):
        if source is not None and source.data is not None and source.data.vocab_size <= vocabulary:
            items = (source.data.validation[i]["input_ids"] for i in range(min(rows, len(source.data.validation))))
            full = [ids[:length] for ids in items if len(ids) >= length]
            if full:
                return torch.stack([full[i % len(full)] for i in range(rows)]).to(loaded.model.device)
    drawn = torch.randint(vocabulary, (rows, length), generator=torch.Generator().manual_seed(0))
    return drawn.to(loaded.model.device)


def speed_tasks(loaded: LoadedRun, ids_BT: Tensor) -> dict[str, Task]:
    """What is timed, on rows of one length for all runs, the first half of them the prompt; nothing without a cache."""
    if "executed" not in loaded.passes:
        return {}
    half = max(ids_BT.shape[1] // 2, 1)
    new = min(NEW_TOKENS, half)
    decoding = {f"decode {rows}": decode_task(loaded.model, ids_BT[:rows, :half], new) for rows in DECODE_BATCHES}
    return {"prefill": prefill_task(loaded.model, ids_BT[:1]), **decoding}


def run_metrics(loaded: LoadedRun, others: LoadedRun | None, rates: Mapping[str, Rate]) -> RunMetrics:
    """All but the speeds, which all runs take in turns. Raises ValueError for a model that cannot run by itself."""
    model, forward = loaded.model, loaded.primary
    ids_BT = sample_ids(loaded, ROWS, loaded.context, others)
    trained = loaded.passes.get("oracle", forward)
    statistics = Statistics(model, activation_rows=0)
    sample = _sample(loaded, ids_BT)
    for batch in sample:
        statistics.add(forward.run(model, batch, output_records=True).records or ())
    return RunMetrics(
        name=loaded.run.name,
        parameters=model.num_parameters(),
        pass_name=forward.name,
        context=loaded.context,
        flops=flop_check(model, forward, sample[:1]),
        layers=statistics.layers(),
        cache=cache_bytes(model, ids_BT) if "executed" in loaded.passes else None,
        overhead=overhead(model, trained, sample[0]),
        result=loaded.run.result() if loaded.run.finished and not loaded.run.is_saved_model else {},
        rates=rates,
        accuracy=_accuracy(loaded),
    )


def _sample(loaded: LoadedRun, ids_BT: Tensor) -> list[dict[str, Tensor]]:
    if loaded.data is None:
        return [{"input_ids": ids_BT}]
    return list(batches(loaded.data, ROWS, loaded.model.device, rows=SAMPLE))


def _accuracy(loaded: LoadedRun) -> Mapping[str, float] | None:
    """On all evaluation rows, where the data know the difficulty."""
    if loaded.data is None or not loaded.data.config.tells_difficulty:
        return None
    rows = batches(loaded.data, ROWS * 4, loaded.model.device)
    return measure_loss(loaded.model, loaded.primary, rows, activations=False).accuracy
