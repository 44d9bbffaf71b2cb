"""A study that is small enough to run: two arms of three steps, registered as `tiny`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from skipstone.runs import Run
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.study import Column, Study

COLUMNS = (
    Column(key="training.parameters", title="parameters", format=",d"),
    Column(key="training.validation.causal_loss", title="loss", better="low", relative=True),
    Column(key="timed.speed", title="speed", format=".1f", better="high"),
)


def summary(folder: Path) -> dict[str, Any]:
    return {"training": Run(folder).result()}


def clocks(runs: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    return {arm: {"timed": {"speed": float(len(runs))}} for arm in runs}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Study]:
    """Return a function that registers the study `tiny`, given another number of steps or fields of `Study`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("a stone that skips over water\n" * 60, encoding="utf-8")

    def recipe(steps: int, **model: Any) -> dict[str, Any]:
        return {
            "model": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, **model},
            "data": {"corpus": "text:text.txt", "context": 16, "tokenizer": "byte", "validation_rows": 2},
            "train": {"steps": steps, "batch_size": 2, "warmup_steps": 1, "eval_every": 0, "save_every": 1},
        }

    def register(steps: int = 3, **options: Any) -> Study:
        mod = [{"name": "mixture_of_depths", "layers": [1], "capacity": 0.5}]
        given: dict[str, Any] = {
            "name": "tiny",
            "purpose": "two arms",
            "arms": lambda scale: {"dense": recipe(steps), "mod": recipe(steps, mechanisms=mod)},
            "seeds": {"laptop": (0,)},
            "columns": COLUMNS,
            "measure": summary,
            "measure_together": clocks,
        }
        study = Study(**{**given, **options})
        monkeypatch.setitem(STUDIES, "tiny", study)
        return study

    return register
