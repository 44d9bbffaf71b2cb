"""The commands that `kills.py` kills, on data so small that each takes a second or less."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from adapt import sources
from kills import NAMES, Scenario
from skipstone.adapt.adaptation import adapt
from skipstone.adapt.export_quantised import export_quantised
from skipstone.adapt.self_generated import write
from skipstone.data.sharding import write_shards
from skipstone.evaluate.budget_curve import calibrate_run
from skipstone.model.pretrained import convert
from skipstone.train.training import train
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.isoflop.run import isoflop
from skipstone_studies.isoflop.spec import make_spec
from skipstone_studies.run import reproduce
from skipstone_studies.study import Column, Study
from train.tool import DENSE, POLYGLU, mod, text_file

torch.set_num_threads(1)
SHORT = {
    "steps": 4,
    "batch_size": 2,
    "warmup_steps": 1,
    "eval_every": 0,
    "eval_rows": 2,
    "save_every": 2,
    "log_every": 1,
}
MODEL: dict[str, Any] = {**DENSE, "hidden_size": 16, "mechanisms": [mod("ema_threshold")], "activation": POLYGLU}
ADAPT: dict[str, Any] = {"model": {"mechanisms": [sources.mixture()]}, "adapt": {"budget": 0.9, "calibration_rows": 2}}


def make_given(folder: Path) -> None:
    """Write to `folder` what the commands start from: a text, a checkpoint to adapt, and a run."""
    text_file(folder)
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": f"{i} {'x' * (i % 9)}"}) + "\n" for i in range(60)))
    sources.save_source(folder / "source")
    train(recipe(folder), out=folder / "run", progress=False)


def recipe(given: Path) -> dict[str, Any]:
    data = {"corpus": f"text:{given / 'text.txt'}", "tokenizer": "char", "context": 16}
    return {"model": {**MODEL, "residual_dropout": 0.1}, "data": data, "train": SHORT}


def given_of(out: Path) -> Path:
    return out.parent / "given"


def trains(out: Path) -> None:
    train(recipe(given_of(out).resolve()), out=out, resume=out.is_dir(), progress=False)


def adapts(out: Path) -> None:
    given = given_of(out).resolve()
    data = {"corpus": f"text:{given / 'text.txt'}", "context": 16, "validation_rows": 2}
    adapt(str(given / "source"), {**ADAPT, "data": data, "train": SHORT}, out=out, resume=out.is_dir(), progress=False)


def prepares(out: Path) -> None:
    write_shards(
        f"jsonl:{given_of(out).resolve() / 'texts.jsonl'}", out, tokenizer="byte", split="80-20", shard_tokens=150
    )


def converts(out: Path) -> None:
    if not out.is_dir():
        convert(str(given_of(out).resolve() / "source"), out)


def writes(out: Path) -> None:
    if not out.is_dir():
        write(str(given_of(out).resolve() / "source"), out, tokens=120, length=12, batch=4, start="the")


def calibrates(out: Path) -> None:
    """Calibrate a saved model, which is first copied to `out`."""
    import shutil

    if not out.is_dir():
        shutil.copytree(given_of(out).resolve() / "run" / "model", out.with_name("given-copy"), dirs_exist_ok=True)
        out.with_name("given-copy").rename(out)
    if not (out / "budget.json").is_file():
        calibrate_run(out, corpus=f"text:{given_of(out).resolve() / 'text.txt'}", context=16, rows=2)


@contextlib.contextmanager
def registered(out: Path) -> Iterator[None]:
    """Register a study of two arms without timings, named "kills", in a `with` block."""
    arms = {"dense": {**recipe(given_of(out).resolve()), "model": {**DENSE, "hidden_size": 16}}}
    arms["mod"] = recipe(given_of(out).resolve())
    STUDIES["kills"] = Study(
        name="kills",
        purpose="two arms that are killed",
        arms=lambda scale: arms,
        seeds={"laptop": (0,)},
        columns=(Column(key="loss", title="loss"),),
        measure=lambda folder: {"loss": json.loads((folder / "result.json").read_text())["train_loss"]},
        measure_together=None,
    )
    try:
        yield
    finally:
        del STUDIES["kills"]


def reproduces(out: Path) -> None:
    with registered(out):
        reproduce("kills", runs=out)


def quantises(out: Path) -> None:
    if not out.is_dir():
        export_quantised(str(given_of(out).resolve() / "source"), out)


def sweeps(out: Path) -> None:
    """Run an isoFLOP grid of one budget, two sizes and two arms."""
    given = recipe(given_of(out).resolve())
    model = {**DENSE, "hidden_size": 16, "mechanisms": [mod("ema_threshold", layers=[1])]}
    data = {**given["data"], "tokenizer": "byte"}
    train_ = {"steps": 4, "batch_size": 2, "warmup_steps": 1, "save_every": 2}
    grid = {"budgets": [1.7e7], "sizes": ["16", "24"], "rates": [1e-3], "arms": ["dense", "mod"], "optimum_seeds": 1}
    spec = make_spec({"name": "tiny", "model": model, "data": data, "train": train_}, **grid)
    isoflop(spec, out=out / "out", runs=out / "runs", command="skipstone isoflop tiny.yaml")


def scenarios() -> list[Scenario]:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    acts = (trains, adapts, reproduces, prepares, converts, writes, calibrates, quantises, sweeps)
    return [Scenario(name=name, act=act) for name, act in zip(NAMES, acts, strict=True)]
