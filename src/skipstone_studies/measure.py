"""Measurements of training runs for studies: losses, FLOPs, speeds (several runs timed in turns), texts, CPU use."""

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
from skipstone.evaluate.comparison import compare
from skipstone.evaluate.evaluation import evaluate
from skipstone.generate.text_generation import stream_text
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import cost
from skipstone.runs import Run
from skipstone_studies.timing import training_speeds


def standard(folder: Path) -> PlainDict:
    """Return the usual figures of a finished run: the summary that its training wrote, and its evaluation.

    folder: the run folder. Keys: `training`, the content of result.json; `evaluation`, what `skipstone eval --json`
    writes: `ways` (loss, accuracy and the mechanisms' figures of each kind of pass), `main` (the kind that represents
    the model), `flops_per_token` and others.
    """
    return {"training": Run(folder).result(), "evaluation": evaluate(folder).to_dict()}


def measure_together(runs: Mapping[str, Path]) -> dict[str, PlainDict]:
    """Return figures that compare the arms of one seed, timed in turns so that noise of the machine affects all alike.

    runs: the run folder of each arm (compared recipe). The result has for each arm: `training_speed`, a dict with
    `tokens_per_second` in training (the median), `spread` (half of the range divided by the median) and `rounds`;
    `comparison`, the figures that `skipstone compare --json` writes of the arm.
    """
    speeds = training_speeds(runs)
    compared = compare(list(runs.values())).to_dict()["runs"]
    return {
        arm: {"training_speed": speeds[arm], "comparison": figures} for arm, figures in zip(runs, compared, strict=True)
    }


def sample(folder: Path, prompt: str, *, seed: int = 0) -> PlainDict:
    """Return text that a run's model generates with the default settings of `skipstone generate`.

    folder: the run folder. prompt: the beginning of the text, at least one character. seed: the seed of the sampling.
    The result has the keys `prompt` and `pieces`: the generated text, without the prompt, as pairs of a piece of text
    and the share (0 to 1) of the blocks' computation that was executed for it. Raises ValueError or FileNotFoundError
    for a run that cannot generate text, such as one without a tokenizer.
    """
    pieces = stream_text(folder, prompt, seed=seed)
    return {"prompt": prompt, "pieces": [[piece.text, round(piece.compute, 4)] for piece in pieces]}


@dataclass(kw_only=True)
class CoreUse:
    """How much of its processor cores a process used while it trained.

    busy: CPU seconds of the process, divided by the seconds of wall time and by the number of its threads; 1 means that
    no other process took time from it. load: the machine's load average over the last minute; NaN where the system has
    none.
    """

    busy: float = 0.0
    load: float = 0.0


@contextmanager
def watched() -> Iterator[CoreUse]:
    """Measure this process's use of its cores during a `with` block.

    The yielded object has zeros until the block ends without an error, and the figures after that.
    """
    clock = CoreUse()
    wall, own = time.perf_counter(), time.process_time()
    yield clock
    clock.busy = (time.process_time() - own) / max(time.perf_counter() - wall, 1e-9) / torch.get_num_threads()
    clock.load = os.getloadavg()[0] if hasattr(os, "getloadavg") else float("nan")


def executed_training(model: SkipstoneForCausalLM, run: Run, steps: int) -> float:
    """Return the training FLOPs of a run by formulas (`model.cost`), for the shares of tokens that blocks really kept.

    The shares are those that the training logged, averaged over its log lines. model: the trained model. run: the
    finished run. steps: number of optimizer steps.
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
    """Return the share that each mechanism kept of the tokens that reached it, as mean over the training's log lines.

    metrics: the entries of metrics.jsonl. The result is {index of the block: {mechanism: share}}.
    """
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
