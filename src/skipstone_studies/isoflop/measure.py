"""Figures of one finished run: the loss of the executed pass on the whole validation set, FLOPs, seconds."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from skipstone.core.strict import PlainDict
from skipstone.evaluate.evaluation import COUNTED_BATCHES
from skipstone.evaluate.loaded_run import batches
from skipstone.measure.flops import flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import PASSES
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import cost
from skipstone.runs import Run
from skipstone_studies.isoflop.grid import CorpusFacts, GridCell

COUNTED_ROWS = 8  # rows per batch whose FLOPs are counted, as in `skipstone eval`
EXECUTED = PASSES["executed"]


@dataclass(kw_only=True)
class CoreUse:
    """How much of its processor cores a process used while it trained.

    busy: CPU seconds per second and thread; 1 means that no other process took time from it. load: the machine's load
    average.
    """

    busy: float = 0.0
    load: float = 0.0


@contextmanager
def watched() -> Iterator[CoreUse]:
    """Measure a process's use of its cores during a `with` block.

    The yielded object is filled at the end, with the load average of the last minute.
    """
    clock = CoreUse()
    wall, own = time.perf_counter(), time.process_time()
    yield clock
    clock.busy = (time.process_time() - own) / max(time.perf_counter() - wall, 1e-9) / torch.get_num_threads()
    clock.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def figures(cell: GridCell, folder: Path, facts: CorpusFacts, clock: CoreUse) -> PlainDict:
    """Return the figures of a finished run for its record.

    cell: what was run. folder: the run folder. facts: the corpus with its rows. clock: use of cores during the
    training. Losses are in nats and are measured on the whole validation set in the pass that really skips;
    `training_flops` are of the whole training, `forward_flops` per token.
    """
    assert facts.data is not None
    run = Run(folder)
    model = run.load_model()
    model.to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    data, device, train = facts.data, model.device, run.config()["train"]
    rows = train["eval_batch_size"] or train["batch_size"]
    found = measure_loss(model, EXECUTED, batches(data, rows, device), activations=False)
    counted = flop_check(model, EXECUTED, batches(data, COUNTED_ROWS, device, rows=COUNTED_BATCHES * COUNTED_ROWS))
    result = run.result()
    return {
        "cell": {
            "arm": cell.arm,
            "budget": cell.budget,
            "size": str(cell.size),
            "rate": cell.rate,
            "steps": cell.steps,
            "parameters": cell.shape.parameters,
        },
        "loss": found.loss,
        "bits_per_byte": found.bits_per_byte(data.validation_bytes),
        "predictions": found.predictions,
        "capacity": {str(i): layer for i, layer in enumerate(_capacities(found.summaries.layers())) if layer},
        "forward_flops": counted.counted,
        "forward_flops_needed": counted.needed,
        "forward_flops_dense": counted.dense,
        "training_flops": {"planned": cell.flops, "executed": executed_training(model, run, cell.steps)},
        "training": result,
        "sharing": {"busy": clock.busy, "load": clock.load},
        "corpus": {**facts.to_dict(), "seen": None if facts.tokens is None else result["tokens"] / facts.tokens},
    }


def _capacities(layers: list[dict[str, PlainDict]]) -> list[dict[str, float]]:
    return [{name: found["capacity"] for name, found in layer.items() if "capacity" in found} for layer in layers]


def executed_training(model: SkipstoneForCausalLM, run: Run, steps: int) -> float:
    """Return the training FLOPs of a run with the shares of kept tokens that its log reports, averaged over log lines.

    model: the trained model. run: its folder. steps: optimizer steps.
    """
    config = run.config()
    context, rows = config["data"]["context"], config["train"]["batch_size"]
    logged = realised(run.metrics())
    kept: dict[int, dict[str, float]] = {}
    for i, block in enumerate(model.decoder.layers):
        first = block.segment_start()  # whose decision is logged for all blocks of the segment
        shares = {**(logged.get(first, {}) if first is not None else {}), **logged.get(i, {})}
        kept[i] = {name: share * context for name, share in shares.items() if name in block.recorded()}
    return cost(model, tokens=context, batch=rows, kept=kept).training.total * steps


def realised(metrics: list[PlainDict]) -> Mapping[int, Mapping[str, float]]:
    """Return the mean share of kept tokens over the training's log lines, {index of the block: {mechanism: share}}."""
    lines: dict[tuple[int, str], list[float]] = {}
    for line in metrics:
        for key, value in line.items() if line["split"] == "train" else ():
            if key.startswith("capacity/"):
                _, layer, name = key.split("/")
                lines.setdefault((int(layer), name), []).append(value)
    found: dict[int, dict[str, float]] = {}
    for (block, mechanism), values in lines.items():
        found.setdefault(block, {})[mechanism] = statistics.fmean(values)
    return found
