"""Part of the study of growth: what a training step costs each of several processes that divide its rows."""

from __future__ import annotations

import json
import multiprocessing
import os
import tempfile
from pathlib import Path

import torch
import torch.distributed as dist

from skipstone.train import parallel
from skipstone.train.recipe import TrainConfig
from skipstone_studies.speed.growth.curves import (
    MODELS,
    SIZE,
    causal_flops,
    least_seconds,
    model_of,
    peak_bytes,
    with_exponents,
)
from skipstone_studies.study import Figures, RecipeDict

COUNTS = (1, 2, 4)
SHARED = {**SIZE, "rows": 128, "width": 128, "repeats": 4}  # rows: of the whole step


def measured(recipe: RecipeDict) -> Figures:
    """Measure a training step under FSDP2 by 1, 2 and 4 processes of this machine (gloo), which divide its rows.

    recipe: an entry of `arms` with a key "seed". Keys of the result: `points`, one dict for each number of processes;
    `exponents` with which time and memory change; `apart`, these minus those of FLOPs and bytes; `rate` in GFLOP/s;
    `seconds` and `peak_mb` of the last point. Seconds are CPU seconds of the process that spends most, and memory is
    that of the process that uses most. Ideally both fall in proportion to the number of processes. Exponents are fitted
    to counts that have a core for each process. All cores are busy at every count: where processes are fewer, further
    groups of them run the same step.
    """
    return with_exponents([_point(recipe, count) for count in recipe["values"]], largest=max(os.cpu_count() or 1, 2))


def _point(recipe: RecipeDict, count: int) -> dict[str, float]:
    """Return the figures of a step by `count` processes, while further groups of as many keep the other cores busy.

    A core computes up to a tenth faster while the others are idle, which one process would have and two would not.
    """
    with tempfile.TemporaryDirectory() as folder:
        fork = multiprocessing.get_context("fork")
        groups = [Path(folder) / str(index) for index in range(max((os.cpu_count() or 1) // count, 1))]
        for group in groups:
            group.mkdir()
        given = [(recipe, count, rank, str(group)) for group in groups for rank in range(count)]
        ranks = [fork.Process(target=_rank, args=args) for args in given]
        for process in ranks:
            process.start()
        for process in ranks:
            process.join()
        if any(process.exitcode for process in ranks):
            raise ValueError(f"a process of {count} ended with {[process.exitcode for process in ranks]}")
        told = [json.loads((group / str(rank)).read_text()) for group in groups for rank in range(count)]
    return {"size": float(count), **{key: max(one[key] for one in told) for key in told[0]}}


def _rank(recipe: RecipeDict, count: int, rank: int, folder: str) -> None:
    """Time a training step as process `rank` of `count`, and write the figures of a curve's point to FOLDER/RANK."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=count)
    model, rows = model_of(recipe).train(), recipe["rows"] // count
    tokens = rows * recipe["context"]
    flops = 3 * causal_flops(model, rows, recipe["context"])
    parallel.prepare(model, TrainConfig(parallel="fsdp2"), torch.device("cpu"))
    ids = torch.randint(0, recipe["vocabulary"], (rows, recipe["context"]))
    optimizer = torch.optim.AdamW(model.parameters())

    def step() -> None:
        model(input_ids=ids, labels=ids, use_cache=False, routing="oracle", noise=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    told = {
        "flops": flops,
        "peak": peak_bytes(step),
        "seconds": least_seconds(step, recipe["repeats"]),
        "bytes": 4.0 * tokens * (2 * recipe["width"] + 3 * int(model.config.intermediate_size or 0)),
    }
    (Path(folder) / str(rank)).write_text(json.dumps(told))
    dist.barrier()
    dist.destroy_process_group()


def arms() -> dict[str, RecipeDict]:
    """Return the recipes of the cost curves by name, one for each model, whose training step several processes share.

    A cost curve is the time and memory of the step by the number of processes.
    """
    common = {**SHARED, "kind": "processes", "axis": "processes", "values": list(COUNTS)}
    return {f"processes, {model}": {**common, "model": model} for model in MODELS}
