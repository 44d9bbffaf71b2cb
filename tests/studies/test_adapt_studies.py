"""Studies that begin with a checkpoint can be interrupted at any moment and resumed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapt.sources import save_source
from skipstone.runs import Run
from skipstone.train import folder as folders
from skipstone.train.watch import MetricsFile
from skipstone_studies import adapting
from skipstone_studies.adapting import adapt_run, source_path, text_folder
from skipstone_studies.catalogue import STUDIES
from skipstone_studies.quality import adapt_stories
from skipstone_studies.record import digest
from skipstone_studies.run import reproduce
from skipstone_studies.study import Column, Study

SAMPLED = {"tokens": 1200, "length": 20, "batch": 16, "start": "s"}
TRAIN = {"steps": 6, "batch_size": 2, "learning_rate": 1e-3, "warmup_steps": 1, "save_every": 2, "log_every": 1}
QUIET = {"eval_every": 0, "eval_rows": 2}
RECORD = Path("runs/small/records/laptop/tuned-seed0.json")


class Killed(BaseException):
    """Stands for the end of the process: nothing may catch it."""


def arms(scale: str) -> dict[str, Any]:
    train = {"data": {"context": 16}, "train": {**TRAIN, **QUIET}}
    loss = {"language_modelling": 0.5, "distillation": 0.5}
    source = {"source": "tiny", "sampled": SAMPLED}
    tuned = {**source, "model": {}, **train, "adapt": {"loss": loss, "calibration_rows": 4}}
    onwards = {**train, "data": {"corpus": "text:more.txt", "context": 16}, "model": {}}
    return {"source": source, "tuned": tuned, "onwards": {"source": {"arm": "tuned"}, **onwards, "adapt": {}}}


def measured(folder: Path) -> dict[str, Any]:
    run = Run(folder)
    loss = None if run.is_saved_model else run.result()["validation"]["causal_loss"]
    return {"parameters": run.load_model().num_parameters(), "loss": loss}


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny checkpoint and a study of it, registered as `small`."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKIPSTONE_DATA", str(tmp_path / "data"))
    save_source(tmp_path / "data" / "tiny")
    (tmp_path / "more.txt").write_text("a stone that skips over water\n" * 60, encoding="utf-8")
    study = Study(
        name="small",
        purpose="a checkpoint, tuned",
        arms=arms,
        seeds={"laptop": (0,)},
        make=adapt_run,
        measure=measured,
        measure_together=None,
        columns=(Column(key="loss", title="loss"), Column(key="parameters", title="parameters", format=",d")),
    )
    monkeypatch.setitem(STUDIES, "small", study)


def at_step(step: int) -> Callable[..., None]:
    def on_step_end(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == step:
            raise Killed

    return on_step_end


def killed(*args: Any, **options: Any) -> None:
    raise Killed


def test_from_a_checkpoint_to_a_page(small: None) -> None:
    page = reproduce("small").read_text(encoding="utf-8")
    assert "| onwards |" in page
    assert "| source | – |" in page
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert record["config"] == arms("laptop")["tuned"]
    assert len(record["digest"]) == 16
    assert str(Path.cwd()) not in json.dumps(record)


MOMENTS: dict[str, tuple[Any, str, Any]] = {
    "while text is sampled": (adapting, "write", killed),
    "while the run folder is written": (folders, "write_json", killed),
    "before the first checkpoint": (MetricsFile, "on_step_end", at_step(1)),
    "after a checkpoint": (MetricsFile, "on_step_end", at_step(5)),
    "before the summary": (folders, "save_result", killed),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_repeated_it_goes_on(moment: str, small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS[moment])
        with pytest.raises(Killed):
            reproduce("small", arms=["source", "tuned"])
    assert not RECORD.exists()
    assert "| tuned |" in reproduce("small", arms=["source", "tuned"]).read_text(encoding="utf-8")
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    resumed = [entry["step"] for entry in record["environment"].get("resumed", [])]
    assert resumed == {"after a checkpoint": [4], "before the summary": [6]}.get(moment, [])
    lines = Path("runs/small/laptop/tuned-seed0/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step"] for line in lines if json.loads(line)["split"] == "train"]
    assert steps == list(range(1, 7))


@pytest.mark.slow
def test_a_killed_run_ends_where_an_unbroken_one_does(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    reproduce("small", arms=["source", "tuned"], runs=Path("whole"), out=Path("whole"))
    with monkeypatch.context() as patch:
        patch.setattr(*MOMENTS["after a checkpoint"])
        with pytest.raises(Killed):
            reproduce("small", arms=["source", "tuned"])
    reproduce("small", arms=["source", "tuned"])
    whole = json.loads(Path("whole/small/records/laptop/tuned-seed0.json").read_text(encoding="utf-8"))
    assert json.loads(RECORD.read_text(encoding="utf-8"))["figures"] == whole["figures"]


def test_each_source_writes_a_text_of_its_own(tmp_path: Path) -> None:
    folder, options = tmp_path / "laptop/a-seed0", {"tokens": 12}
    (tmp_path / "laptop/b-seed0").mkdir(parents=True)
    (tmp_path / "laptop/b-seed1").mkdir()
    for name in ("b-seed0", "b-seed1"):
        (tmp_path / "laptop" / name / "config.yaml").write_text("{}", encoding="utf-8")
    asked: list[tuple[Path, Any, Any]] = [
        (folder, "one", options),
        (folder, "two", options),
        (folder, "one", {"tokens": 13}),
        (folder, {"arm": "b"}, options),
        (folder.with_name("a-seed1"), {"arm": "b"}, options),
    ]
    assert len({text_folder(*each) for each in asked}) == len(asked)
    assert text_folder(folder, "one", options) == text_folder(folder.with_name("c-seed7"), "one", options)


def test_a_text_in_a_folder_named_by_the_options_alone_is_read_on(tmp_path: Path) -> None:
    folder, options = tmp_path / "laptop/a-seed0", adapt_stories.SAMPLED
    earlier = folder.with_name(f"text-{digest(options)}")
    assert text_folder(folder, "stories260K", options) != earlier
    earlier.mkdir(parents=True)
    assert text_folder(folder, "stories260K", options) == earlier
    assert text_folder(folder, "another", options) != earlier


def test_an_arm_that_is_needed_is_named(small: None) -> None:
    with pytest.raises(ValueError, match="the run of arm 'tuned' is not in"):
        reproduce("small", arms=["onwards"])


def test_a_checkpoint_that_is_nowhere_is_one_line(small: None) -> None:
    with pytest.raises(FileNotFoundError, match="checkpoint 'stories' was not found"):
        source_path("stories")
    assert source_path("tiny").endswith("data/tiny")
    assert source_path("SmolLM2-135M-Instruct") == "HuggingFaceTB/SmolLM2-135M-Instruct"
