"""Law 10: an interrupted and resumed run equals an uninterrupted one exactly: weights and logged figures."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from skipstone.data.packing import RandomWindows
from skipstone.runs import Run
from skipstone.train import watch
from skipstone.train.best import validation_loss
from skipstone.train.watch import Interrupted
from train.tool import MODELS, at_step, equal, lines, quick, recipe, train, weights

PARTS = {"activation_checkpointing": True, "gradient_accumulation": 2}


class PowerCut(RuntimeError):
    pass


def cut() -> None:
    raise PowerCut


def same(one: Path, other: Path) -> bool:
    untimed = [
        {name: value for name, value in Run(folder).result().items() if "second" not in name} for folder in (one, other)
    ]
    return equal(weights(one), weights(other)) and lines(one) == lines(other) and untimed[0] == untimed[1]


@pytest.mark.parametrize("name", quick(MODELS, "all"))
def test_resume_is_exact(name: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS[name], keep_best=True)
    whole = train(config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with at_step(7, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted) as left:
        train(config, stopped)
    assert left.value.code == 128 + signal.SIGTERM
    assert [path.name for path in (stopped / "checkpoints").glob("*")] != []
    assert (stopped / "checkpoints" / "checkpoint-7").is_dir()
    assert not (stopped / "model").exists()
    train(config, stopped, resume=True)
    assert same(whole, stopped)
    assert [entry["step"] for entry in json.loads((stopped / "environment.json").read_text())["resumed"]] == [7]
    told = [(validation_loss(line), line["step"]) for line in lines(whole, "validation")]
    for folder in (whole, stopped):
        best = Run(folder).best()
        assert best is not None
        assert (best["loss"], best["step"]) == min(told)
        kept = Run(folder / "best").load_model()
        assert kept.config.use_cache
    assert equal(load_file(whole / "best" / "model.safetensors"), load_file(stopped / "best" / "model.safetensors"))


@pytest.mark.parametrize(
    ("options", "name"),
    [
        pytest.param({}, "all", id="plain-all", marks=pytest.mark.slow),
        pytest.param({}, "random", id="plain-random", marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, "all", id="bf16-all", marks=pytest.mark.slow),
        pytest.param({"precision": "bf16"}, "random", id="bf16-random", marks=pytest.mark.slow),
        pytest.param(PARTS, "all", id="checkpointed-all", marks=pytest.mark.slow),
        pytest.param(PARTS, "random", id="checkpointed-random", marks=pytest.mark.slow),
    ],
)
def test_resume_after_a_crash_is_exact(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS[name], **options)
    whole = train(config, tmp_path / "whole")
    crashed = tmp_path / "crashed"
    with at_step(10, cut), pytest.raises(PowerCut):
        train(config, crashed)
    assert [line["step"] for line in lines(crashed)] == [1, 3, 5, 6, 9]
    train(config, crashed, resume=True)
    assert same(whole, crashed)
    resumed = json.loads((crashed / "environment.json").read_text())["resumed"]
    assert [entry["step"] for entry in resumed] == [5]
    assert resumed[0]["changed"] == {}


@pytest.mark.slow
def test_a_crash_before_the_first_checkpoint_starts_again(tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS["random"])
    whole = train(config, tmp_path / "whole")
    with at_step(4, cut), pytest.raises(PowerCut):
        train(config, tmp_path / "crashed")
    train(config, tmp_path / "crashed", resume=True)
    assert same(whole, tmp_path / "crashed")


@pytest.mark.slow
def test_a_checkpoint_that_was_not_finished_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path, MODELS["polyglu"])
    whole = train(config, tmp_path / "whole")
    broken = tmp_path / "broken"
    with monkeypatch.context() as patch:
        patch.setattr("transformers.Trainer._save_rng_state", lambda *_: cut())
        with pytest.raises(PowerCut):
            train(config, broken)
    assert list((broken / "checkpoints").iterdir()) == []
    train(config, broken, resume=True)
    assert same(whole, broken)


@pytest.mark.slow
def test_resuming_reads_no_row_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path, MODELS["dense"])
    with at_step(7, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(config, tmp_path / "run")
    read: list[int] = []
    batch = RandomWindows.batch

    def watched(self: RandomWindows, index_B: np.ndarray[Any, Any]) -> Any:
        read.extend(index_B.tolist())
        return batch(self, index_B)

    monkeypatch.setattr(RandomWindows, "batch", watched)
    train(config, tmp_path / "run", resume=True)
    assert read == list(range(7 * 4, 12 * 4))


def test_a_finished_run_is_left_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, MODELS["dense"], steps=2)
    folder = train(config, tmp_path / "run")
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert train(config, folder, resume=True) == folder
    assert "finished already" in capsys.readouterr().err
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_only_the_newest_checkpoints_stay(tmp_path: Path) -> None:
    folder = train(recipe(tmp_path, MODELS["dense"], save_every=2, keep_checkpoints=3), tmp_path / "run")
    found = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert found == ["checkpoint-10", "checkpoint-12", "checkpoint-8"]
    assert not list(folder.rglob("training_args.bin"))


@pytest.mark.slow
def test_a_checkpoint_by_time_is_as_exact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = recipe(tmp_path, MODELS["ema_threshold"], save_every=0)
    whole = train(config, tmp_path / "whole")
    now = iter(range(1000))
    monkeypatch.setattr(watch, "monotonic", lambda: 60.0 * next(now))  # each look at the clock is a minute later
    crashed = tmp_path / "crashed"
    with at_step(8, cut), pytest.raises(PowerCut):
        train({**config, "train": {**config["train"], "save_minutes": 2}}, crashed)
    found = sorted(path.name for path in (crashed / "checkpoints").iterdir())
    assert found == ["checkpoint-4", "checkpoint-6"]
    train(config, crashed, resume=True)
    assert same(whole, crashed)


@pytest.mark.slow
def test_when_it_saves_may_change_when_it_resumes(tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS["dense"])
    whole = train(config, tmp_path / "whole")
    crashed = tmp_path / "crashed"
    with at_step(7, cut), pytest.raises(PowerCut):
        train(config, crashed)
    other = {**config, "train": {**config["train"], "save_every": 3, "save_minutes": 30.0, "keep_checkpoints": 1}}
    train(other, crashed, resume=True)
    assert same(whole, crashed)
    assert [path.name for path in (crashed / "checkpoints").iterdir()] == ["checkpoint-12"]


def test_a_finished_run_is_not_that_of_another_model(tmp_path: Path) -> None:
    folder = train(recipe(tmp_path, MODELS["dense"], steps=2), tmp_path / "run")
    wider = {**MODELS["dense"], "num_hidden_layers": 9}
    with pytest.raises(ValueError, match=r"differs from the run's in model\.num_hidden_layers"):
        train(recipe(tmp_path, wider, steps=2), folder, resume=True)
