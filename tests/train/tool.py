"""Small runs that take a second each: a model of width 32 on a few kilobytes of text."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from forks import fork, held
from skipstone.core.lock import locked
from skipstone.train import training
from skipstone.train.watch import StopSignals

SENTENCE = "It was the best of times, it was the worst of times, it was the age of wisdom, it was foolishness. "

DENSE: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def mod(decision: str, **options: Any) -> dict[str, Any]:
    return {"name": "mixture_of_depths", "layers": ":", "capacity": 0.25, "decision": decision, **options}


TSA = {"name": "token_selective", "layers": ":"}
EXECUTED = {"training": "hard", "capacity": [0.7, 0.4], "capacity_warmup": 0.7, "guidance": True}
EXIT = {"name": "early_exit", "layers": ":"}
POLYGLU = {"name": "polyglu"}
SEGMENT = {"name": "segment", "layers": ":", "benefit": True, "auxiliary_weight": 1.0}
SCHEDULES = {"capacity": {"start": 0.5, "end": 0.25}, "capacity_warmup": 0.7, "warmup_shape": "cosine"}
SCHEDULES |= {"exploration": 0.5, "kv": "full", "skip": "low_rank"}

# Every family, with whatever draws random numbers or keeps state of its own.
MODELS: dict[str, dict[str, Any]] = {
    "dense": {**DENSE, "embedding_dropout": 0.1, "residual_dropout": 0.1},
    "topk": {**DENSE, "mechanisms": [mod("topk", weight="tanh")]},
    "threshold": {**DENSE, "mechanisms": [mod("threshold", weight="raw")]},
    "predictor": {**DENSE, "mechanisms": [mod("predictor", weight="raw")]},
    "ema_threshold": {**DENSE, "mechanisms": [mod("ema_threshold")]},
    "scheduled": {**DENSE, "mechanisms": [mod("ema_threshold", **SCHEDULES)]},
    "random": {**DENSE, "mechanisms": [mod("random", weight="none")]},
    "token_selective": {**DENSE, "mechanisms": [TSA]},
    "token_selective_hard": {**DENSE, "mechanisms": [{**TSA, **EXECUTED}]},
    "early_exit": {**DENSE, "mechanisms": [EXIT]},
    "polyglu": {**DENSE, "activation": POLYGLU},
    "experts": {**DENSE, "mlp": "experts", "experts": {"count": 3, "no_op": 1, "balance_rate": 0.01}},
    "segment": {**DENSE, "mechanisms": [SEGMENT, {"name": "layer_dropout", "rate": 0.5}]},
    "boundary": {**DENSE, "mechanisms": [mod("boundary", boundary={"ids": "tokenizer"}, capacity_warmup=0.5)]},
    "all": {**DENSE, "mechanisms": [mod("ema_threshold"), TSA, EXIT], "activation": POLYGLU},
}
# Those whose training step draws no random numbers, so that it may be cut into micro-batches at will. (The balancing
# loss of experts is a product of two means over a micro-batch, the target of guided gates a quantile of one.)
QUIET = {
    name: model
    for name, model in MODELS.items()
    if name not in ("dense", "scheduled", "random", "token_selective_hard", "polyglu", "experts", "segment", "all")
}
QUIET["polyglu"] = {**DENSE, "activation": {"name": "polyglu", "noise": False}}


def quick(names: Iterable[str], *kept: str) -> list[Any]:
    """Return pytest parameters for `names`, of which all but `kept` are marked slow.

    The quick suite trains only the models that cover most.
    """
    assert {*kept} <= {*names}
    return [pytest.param(name, marks=() if name in kept else pytest.mark.slow) for name in names]


def text_file(folder: Path) -> Path:
    """Write a text to `folder` whose lines all differ, so that rows at different places do too; return its path."""
    path = folder / "text.txt"
    path.write_text("".join(f"{i * i} {SENTENCE[i % 50 :]}" for i in range(60)), encoding="utf-8")
    return path


def recipe(folder: Path, model: dict[str, Any], **train: Any) -> dict[str, Any]:
    """Return a recipe of 12 steps of 4 rows of 32 characters, on text written to `folder`.

    model: its section `model`. train: further options of the section `train`.
    """
    short = {"steps": 12, "batch_size": 4, "warmup_steps": 2, "learning_rate": 0.01, "log_every": 3}
    often = {"eval_every": 5, "eval_rows": 6, "save_every": 5}
    data = {"corpus": f"text:{text_file(folder)}", "tokenizer": "char", "context": 32}
    return {"model": model, "data": data, "train": {**short, **often, **train}}


def train(config: dict[str, Any], out: Path, resume: bool = False) -> Path:
    return training.train(config, out=out, resume=resume, progress=False)


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def lines(folder: Path, split: str | None = None) -> list[dict[str, Any]]:
    """Return the lines of a run's metrics.jsonl without times and checksums, which differ from run to run.

    split: only lines of this split; None means all.
    """
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if k not in ("tokens_per_second", "crc32")}
        for line in found
        if split in (None, line["split"])
    ]


@contextmanager
def at_step(step: int, act: Callable[[], None]) -> Iterator[None]:
    """Call `act` at the end of a step of training in a `with` block, before anything is logged or saved."""
    before = StopSignals.on_step_end

    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            act()
        before(self, args, state, control, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignals, "on_step_end", on_step_end)
        yield


@contextmanager
def held_by_another(folder: Path) -> Iterator[int]:
    """Let another process hold the lock of `folder` in a `with` block; yield its process id."""
    ready, tell = os.pipe()

    def hold() -> None:
        with locked(folder):
            os.write(tell, b".")
            signal.pause()

    with held(fork(hold)) as other:
        assert os.read(ready, 1) == b"."
        yield other
    os.close(ready)
    os.close(tell)
