"""A run folder while it is written. Files appear complete: each is written aside and renamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from skipstone.core.atomic_write import write_whole
from skipstone.runs import CONFIG, ENVIRONMENT, METRICS, MODEL, RESULT, Run, read_metrics
from skipstone.train import environment
from skipstone.train.recipe import NOT_THE_RESULT, Recipe

DATA = "data_sha256"  # in environment.json


def default_folder(recipe: Recipe) -> Path:
    """runs/NAME, or runs/CORPUS-TIME for a recipe without a name."""
    if recipe.name is not None:
        return Path("runs") / recipe.name
    corpus = recipe.data.corpus.partition(":")[0]
    return Path("runs") / f"{corpus}-{datetime.now():%Y%m%d-%H%M%S}"


def check_new(folder: Path) -> None:
    """Raise FileExistsError if anything is at `folder`."""
    if folder.exists() or folder.is_symlink():
        raise FileExistsError(
            f"run folder {str(folder)!r} exists already and nothing is overwritten; name another with --out, or go on "
            "with it by --resume"
        )


def create(folder: Path, config: Mapping[str, Any], seed: int, data: str | None = None) -> None:
    """A new run folder with its recipe and environment. data: fingerprint of shards that it trains on."""
    check_new(folder)
    folder.mkdir(parents=True)
    more = {} if data is None else {DATA: data}
    write_json(folder / ENVIRONMENT, environment.describe(seed) | more)
    write_whole(
        folder / CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True)
    )  # last: now it is a run


def check_same(saved: Mapping[str, Any], given: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError naming the first key in which the recipe differs from the one of the run to be resumed.

    When and how many checkpoints are written may differ.
    """
    for key in {**saved, **given}:
        if where == "train." and key in NOT_THE_RESULT:
            continue
        path, old, new = f"{where}{key}", saved.get(key), given.get(key)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            check_same(old, new, f"{path}.")
        elif old != new:
            raise ValueError(
                f"the recipe differs from the run's in {path}: {old!r} there, {new!r} now; a run is resumed with the "
                "recipe it was started with"
            )


def check_data(folder: Path, data: str | None) -> None:
    """Raise ValueError if the shards are not those that the run began with."""
    known = Run(folder).environment().get(DATA)
    if known != data:
        raise ValueError(
            f"the shards have changed since the run {str(folder)!r} began (fingerprint {known} there, {data} now); "
            "a run is resumed with the data it was started with"
        )


def note_resumption(folder: Path, step: int) -> None:
    """Add this process to environment.json, and name what has changed since the run began."""
    known = Run(folder).environment()
    now = environment.describe(known["seed"])
    changed = {key: now[key] for key in now if key not in environment.session() and now[key] != known.get(key)}
    known.setdefault("resumed", []).append({"step": step, **environment.session(), "changed": changed})
    write_json(folder / ENVIRONMENT, known)


def cut_metrics(folder: Path, step: int) -> None:
    """Forget lines after `step`: the steps they tell of are about to be done again."""
    path = folder / METRICS
    if path.is_file():
        kept = [line for line in read_metrics(path) if line["step"] <= step]
        write_whole(path, "".join(json.dumps(line) + "\n" for line in kept))


def save_model(folder: Path, model: Any, tokenizer: Any, card: Mapping[str, Any]) -> None:
    """RUN/model, whole or not at all: weights, tokenizer, model card."""
    from skipstone.model.card import write_card

    partial = folder / f".{MODEL}"
    shutil.rmtree(partial, ignore_errors=True)
    model.save_pretrained(partial)
    if tokenizer is not None:
        tokenizer.save_pretrained(partial)
    write_card(model, partial, title=folder.resolve().name, **card)
    shutil.rmtree(folder / MODEL, ignore_errors=True)  # of a process that was killed before it wrote the summary
    partial.replace(folder / MODEL)


def save_result(folder: Path, result: Mapping[str, Any]) -> None:
    write_json(folder / RESULT, result)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    write_whole(path, json.dumps(value, indent=2) + "\n")
