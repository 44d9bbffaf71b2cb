"""Files saved by commit c9a02a1 can be read, and give the same figures as then.

`c9a02a1/run` was trained by that commit: 4 steps of width 16 on Reset-S3 with Mixture-of-Depths, Token-Selective
Attention and PolyGLU. It has the `dial.json` that `skipstone calibrate` wrote. `c9a02a1/evaluation.json` is what
`skipstone eval --budget .8 --json` said of it. `c9a02a1/record.json` is a record of the study `tsa_enwik8`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from skipstone.budget import BudgetTable
from skipstone.evaluate.evaluation import evaluate
from skipstone.report.rendering import write_report
from skipstone.runs import Run
from skipstone.train.recipe import read_recipe
from skipstone_studies.record import digest
from skipstone_studies.record import read as read_record

SAVED = Path(__file__).parent / "c9a02a1"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, for figures that are kept with a run must not end in the repository."""
    return shutil.copytree(SAVED / "run", tmp_path_factory.mktemp("saved") / "run")


def test_dial_json_is_a_budget_table(run: Path) -> None:
    written = json.loads((run / "model" / "dial.json").read_text(encoding="utf-8"))
    table = BudgetTable.load(run / "model")
    assert list(table.handles) == written["knobs"] == ["1 mixture_of_depths", "2 token_selective"]
    assert [(p.share, list(p.thresholds), list(p.kept)) for p in table.points] == [
        (stop["share"], stop["lines"], stop["kept"]) for stop in written["stops"]
    ]
    with pytest.raises(FileExistsError, match=r"dial\.json' exists already"):
        table.save(run / "model")


def test_budget_json_goes_before_dial_json(run: Path, tmp_path: Path) -> None:
    model = shutil.copytree(run / "model", tmp_path / "model")
    old = BudgetTable.load(model)
    (model / "dial.json").rename(tmp_path / "aside.json")
    assert old.save(model) == model / "budget.json"
    (model / "dial.json").write_text("{", encoding="utf-8")
    assert BudgetTable.load(model) == old


def test_figures_are_those_of_then(run: Path) -> None:
    then = json.loads((SAVED / "evaluation.json").read_text(encoding="utf-8"))
    now = evaluate(run, batch_size=4, budgets=[0.8]).to_dict()
    trained, budget = now["budgets"]
    assert [trained["target"], budget["target"]] == [None, 0.8]
    for point in (*then["budgets"], *now["budgets"]):
        point.pop("asked", None), point.pop("target", None)
    assert set(now) == set(then)
    for key, value in then.items():
        assert close(now[key], value), f"{key}: {now[key]} now, {value} then"


def close(now: Any, then: Any) -> bool:
    """Equal but for rounding; a figure that is a difference of equal passes is rounding alone."""
    if isinstance(then, dict):
        return now.keys() == then.keys() and all(close(now[key], value) for key, value in then.items())
    if isinstance(then, list):
        return len(now) == len(then) and all(close(a, b) for a, b in zip(now, then, strict=True))
    return bool(now == pytest.approx(then, rel=1e-4, abs=1e-6)) if isinstance(then, float) else bool(now == then)


def test_the_recipe_is_read(run: Path) -> None:
    config = Run(run).config()
    recipe = read_recipe(config)
    assert (recipe.train.steps, recipe.data.corpus) == (4, "reset-s3")
    assert [entry["name"] for entry in recipe.model["mechanisms"]] == ["mixture_of_depths", "token_selective"]


def test_a_record_of_a_study_is_read() -> None:
    written = json.loads((SAVED / "record.json").read_text(encoding="utf-8"))
    record = read_record(SAVED / "record.json")
    assert (record.study, record.arm, record.seed) == ("tsa_enwik8", "dense", 0)
    assert (record.figures, record.timing_session) == (written["figures"], written["sitting"])
    assert digest(record.config) == record.digest == written["digest"]
    assert read_recipe(record.config).data.corpus == record.config["data"]["corpus"]


def test_a_report_shows_run_and_evaluation(run: Path, tmp_path: Path) -> None:
    page = write_report([run], tmp_path / "page.html", evaluations=[SAVED / "evaluation.json"])
    html = page.read_text(encoding="utf-8")
    assert "loss by budget" in html
    assert "80.0%" in html
    assert "mixture of depths on blocks 1" in html
