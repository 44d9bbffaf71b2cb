"""`reproduce --arms`, the remaining time, and two processes on one study."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from skipstone.core.lock import Busy
from skipstone.train.training import train
from skipstone_studies import pace, study
from skipstone_studies.pace import TimeLeft, work
from skipstone_studies.run import named_arms, reproduce
from skipstone_studies.study import Study
from train.tool import held_by_another

Register = Callable[..., Study]


@pytest.mark.slow
def test_the_arms_that_are_named_are_run(tiny: Register) -> None:
    tiny()
    reproduce("tiny", arms=["mod"])
    assert [path.name for path in Path("runs/tiny/records/laptop").iterdir()] == ["mod-seed0.json"]
    assert reproduce("tiny").is_file()
    assert len(list(Path("runs/tiny/records/laptop").iterdir())) == 2


def test_an_unknown_arm_is_one_line_that_names_the_arms(tiny: Register) -> None:
    tiny()
    with pytest.raises(ValueError, match=r"unknown arm of 'tiny' 'mud'; did you mean 'mod'\? \(allowed: dense, mod\)"):
        reproduce("tiny", arms=["mud"])
    assert not Path("runs").exists()


def test_an_arm_that_another_process_runs_is_left_out(tiny: Register, capsys: pytest.CaptureFixture[str]) -> None:
    tiny()
    folder = Path("runs/tiny/laptop/dense-seed0")
    with held_by_another(folder) as other:
        reproduce("tiny")
        said = capsys.readouterr().err
        assert said.count("left out") == 1
        assert f"dense, seed 0: left out, because '{folder}' is in use by another process (process {other})" in said
        assert not folder.exists()
        records = Path("runs/tiny/records/laptop")
        assert [path.name for path in records.iterdir()] == ["mod-seed0.json"]
    reproduce("tiny")  # the other process was killed, and its lock went with it
    assert {path.name for path in records.iterdir()} == {"dense-seed0.json", "mod-seed0.json"}
    assert not list(Path("runs").rglob("*.lock"))


def test_two_trainings_into_one_folder_are_refused(tiny: Register) -> None:
    recipe = tiny().recipes("laptop")["dense"]
    for resume in (False, True):
        with held_by_another(Path("run")), pytest.raises(Busy, match="in use by another process"):
            train(recipe, out=Path("run"), resume=resume, progress=False)
        train(recipe, out=Path("run"), resume=resume, progress=False)


def test_what_is_left_counts_the_arms_to_come(tiny: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny(steps=40).recipes("laptop")["dense"]
    assert work(recipe) == 40 * 2 * 16 * 2
    monkeypatch.setattr(pace, "monotonic", iter([60.0, 120.0, 158.0, 180.0]).__next__)
    said: list[str] = []
    recipe["train"]["save_every"] = 25
    train(recipe, out=Path("run"), callbacks=[TimeLeft(2.0, said.append)])
    assert said == [
        "step 20 of 40, 2 s each: 40 s left of this arm, about 3.3 min of all",
        "step 25 of 40, 2.5 s each: 38 s left of this arm, about 4.0 min of all",
    ]


def test_a_study_saves_by_time(tiny: Register, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    run = study.train
    monkeypatch.setattr(study, "train", lambda *args, **options: (asked.append(options), run(*args, **options))[1])
    tiny()
    reproduce("tiny", arms=["dense"])
    assert asked[0]["save_minutes"] == 10


def test_names_of_arms_may_hold_commas() -> None:
    known = ("dense", "dense, tuned", "a, b, c")
    assert named_arms(["dense", "tuned", "dense", "a", "b", "c", "other"], known) == [
        "dense, tuned",
        "dense",
        "a, b, c",
        "other",
    ]
