"""`reproduce` runs what is missing and never what is recorded, and can be interrupted at any moment."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from skipstone.train.watch import MetricsFile
from skipstone_studies import study
from skipstone_studies.run import describe, reproduce
from skipstone_studies.study import Study

Register = Callable[..., Study]
RECORD = Path("runs/tiny/records/laptop/mod-seed0.json")


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the run folders that were given to training."""
    folders: list[str] = []
    train = study.train

    def note(recipe: Any, *, out: Path, **options: Any) -> Path:
        folders.append(out.name)
        return train(recipe, out=out, **options)

    monkeypatch.setattr(study, "train", note)
    return folders


def test_from_nothing_to_table_report_and_records(tiny: Register, trained: list[str]) -> None:
    tiny()
    path = reproduce("tiny")
    assert path == Path("runs/tiny.md")
    assert trained == ["dense-seed0", "mod-seed0"]
    text = path.read_text(encoding="utf-8")
    assert "## laptop, text:text.txt" in text
    assert "| mod |" in text
    report = Path("runs/tiny/laptop/report.html").read_text(encoding="utf-8")
    assert "Report on 2 runs" in report
    assert "mixture of depths on blocks 1" in report


def test_a_record_is_complete(tiny: Register) -> None:
    made = tiny()
    reproduce("tiny", seeds=[4])
    record = json.loads(Path("runs/tiny/records/laptop/mod-seed4.json").read_text(encoding="utf-8"))
    assert record["config"] == made.recipes("laptop")["mod"]
    assert (record["seed"], record["environment"]["seed"]) == (4, 4)
    assert {"skipstone", "torch", "transformers", "python", "git_commit", "git_dirty", "machine", "started"} <= set(
        record["environment"]
    )
    assert record["command"] == "skipstone reproduce tiny --scale laptop"
    assert record["figures"]["training"]["steps"] == 3
    assert record["figures"]["timed"] == {"speed": 2.0}
    assert record["sitting"]["arms"] == ["dense", "mod"]
    assert str(Path.cwd()) not in json.dumps(record), "a record that is published tells no paths of the machine"


@pytest.mark.slow
def test_a_seed_is_the_recipe_s_seed(tiny: Register) -> None:
    tiny()
    reproduce("tiny", seeds=[4])
    recipe = json.loads(Path("runs/tiny/laptop/mod-seed4.recipe.json").read_text(encoding="utf-8"))
    assert (recipe["train"]["seed"], recipe["data"]["seed"]) == (4, 4)


@pytest.mark.slow
def test_what_is_recorded_is_never_run_again(tiny: Register, trained: list[str]) -> None:
    tiny()
    first = reproduce("tiny").read_bytes()
    trained.clear()
    assert reproduce("tiny").read_bytes() == first
    assert trained == []
    reproduce("tiny", seeds=[0, 1])
    assert trained == ["dense-seed1", "mod-seed1"]


@pytest.mark.slow
def test_a_lost_record_is_measured_again_without_training(tiny: Register, trained: list[str]) -> None:
    tiny()
    reproduce("tiny")
    trained.clear()
    RECORD.unlink()
    reproduce("tiny")
    assert trained == []
    assert json.loads(RECORD.read_text(encoding="utf-8"))["sitting"]["arms"] == ["dense", "mod"]


@pytest.mark.slow
def test_another_recipe_runs_anew_and_overwrites_no_run(tiny: Register, trained: list[str]) -> None:
    tiny()
    reproduce("tiny")
    trained.clear()
    tiny(steps=4)
    reproduce("tiny")
    assert trained == ["dense-seed0", "mod-seed0"]
    assert len(list(Path("runs/tiny/laptop").glob("mod-seed0.*/result.json"))) == 1
    assert "left out" not in Path("runs/tiny.md").read_text(encoding="utf-8")


def test_an_interrupted_run_goes_on_from_its_checkpoint(
    tiny: Register, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny()
    with monkeypatch.context() as patch:
        patch.setattr(MetricsFile, "on_step_end", _signal_after_the_first_step)
        with pytest.raises(SystemExit):
            reproduce("tiny")
    assert "repeat the command to continue" in capsys.readouterr().err
    folder = Path("runs/tiny/laptop/dense-seed0")
    assert not (folder / "result.json").exists()
    reproduce("tiny")
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(lines[-1])["step"] == 3
    record = json.loads(Path("runs/tiny/records/laptop/dense-seed0.json").read_text(encoding="utf-8"))
    assert record["environment"]["resumed"][0]["step"] == 2


def _signal_after_the_first_step(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
    """What Ctrl-C does."""
    if state.global_step == 1:
        os.kill(os.getpid(), signal.SIGINT)


def test_an_arm_that_fails_is_one_line_and_the_others_go_on(tiny: Register, capsys: pytest.CaptureFixture[str]) -> None:
    made = tiny()
    arms = made.recipes("laptop")
    arms["dense"]["train"]["learning_rate"] = -1.0
    tiny(arms=lambda scale: arms)
    with pytest.raises(ValueError, match=r"1 of tiny's runs failed: tiny, arm 'dense', seed 0: .*learning_rate"):
        reproduce("tiny")
    assert "| mod |" in Path("runs/tiny.md").read_text(encoding="utf-8")
    assert capsys.readouterr().err.count("arm 'dense'") == 1


def test_a_foreign_folder_is_left_alone(tiny: Register) -> None:
    tiny()
    foreign = Path("runs/tiny/laptop/dense-seed0")
    foreign.mkdir(parents=True)
    with pytest.raises(ValueError, match="was not made by this command"):
        reproduce("tiny")
    assert list(foreign.iterdir()) == []


@pytest.mark.slow
def test_records_go_where_they_are_wanted_and_runs_are_not_repeated_for_it(tiny: Register, trained: list[str]) -> None:
    tiny()
    reproduce("tiny")
    trained.clear()
    assert reproduce("tiny", out=Path("results")) == Path("results/tiny.md")
    assert trained == []
    assert Path("results/tiny/records/laptop/mod-seed0.json").is_file()


@pytest.mark.slow
def test_rendering_alone_gives_the_same_bytes(tiny: Register, trained: list[str]) -> None:
    tiny()
    path = reproduce("tiny")
    before = path.read_bytes()
    path.unlink()
    trained.clear()
    reproduce("tiny", render_only=True)
    assert (path.read_bytes(), trained) == (before, [])


@pytest.mark.slow
def test_a_readme_gets_the_table_between_its_marks(tiny: Register) -> None:
    tiny()
    readme = Path("README.md")
    readme.write_text("above\n<!-- tiny:begin -->\nold\n<!-- tiny:end -->\nbelow\n", encoding="utf-8")
    reproduce("tiny", readme=readme)
    text = readme.read_text(encoding="utf-8")
    assert text.startswith("above\n<!-- tiny:begin -->\n")
    assert text.endswith("<!-- tiny:end -->\nbelow\n")
    assert "| mod |" in text
    assert "old" not in text
    reproduce("tiny", readme=readme, render_only=True)
    assert readme.read_text(encoding="utf-8") == text


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "does not exist"),
        ("nothing", "no place for the table"),
        ("<!-- tiny:end --><!-- tiny:begin -->", "below"),
    ],
)
def test_a_readme_without_a_place_is_refused_before_anything_runs(
    content: str | None, says: str, tiny: Register, trained: list[str]
) -> None:
    tiny()
    if content is not None:
        Path("README.md").write_text(content, encoding="utf-8")
    with pytest.raises((FileNotFoundError, ValueError), match=says):
        reproduce("tiny", readme=Path("README.md"))
    assert trained == []


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("dmeo", {}, "unknown study 'dmeo'; did you mean 'demo'"),
        ("tiny", {"scale": "paper"}, "unknown scale of study 'tiny' 'paper'"),
        ("tiny", {"scale": "labtop"}, "did you mean 'laptop'"),
        ("tiny", {"seeds": []}, "at least one seed"),
        ("tiny", {"seeds": [-1]}, "none negative"),
        ("tiny", {"render_only": True}, "no records of 'tiny' in 'runs'"),
    ],
)
def test_bad_input_is_one_line(name: str, options: dict[str, Any], says: str, tiny: Register) -> None:
    tiny()
    with pytest.raises(ValueError, match=says):
        reproduce(name, **options)
    assert not Path("runs").exists()


@pytest.mark.slow
def test_the_first_corpus_that_can_be_had_is_taken(tiny: Register, capsys: pytest.CaptureFixture[str]) -> None:
    tiny(corpora=("text:absent.txt", "text:text.txt"))
    reproduce("tiny")
    assert "using text:text.txt: " in capsys.readouterr().err
    assert "## laptop, text:text.txt" in Path("runs/tiny.md").read_text(encoding="utf-8")


def test_describe_names_every_study() -> None:
    assert {"demo", "reset_s3"} <= set(describe())
