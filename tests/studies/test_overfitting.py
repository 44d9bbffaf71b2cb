"""The last and best step of a run that reads its text many times, and the paper's way to measure a loss."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skipstone.runs import Run
from skipstone_studies.quality.tsa import overfitting, recipes
from skipstone_studies.study import seeded
from train.tool import MODELS, recipe, train


def figures(curve: list[list[float | None]], last: float, best: float) -> dict[str, Any]:
    splits = {"validation": {"executed": best}, "test": {"executed": best + 1}}
    return {
        "evaluation": {"ways": {"executed": {"loss": last}}},
        "overfitting": {"curve": curve, "best": {"step": 20, **splits}, "test": {"executed": last + 1}},
    }


def test_the_table_says_where_an_arm_begins_to_overfit() -> None:
    rising = figures([[10, 2.0, 2.1], [20, 1.5, 1.6], [30, 1.4, 1.605], [40, 1.3, 1.7], [50, 1.2, 1.65]], 1.65, 1.6)
    falling = figures([[10, 2.0, None], [20, 1.5, None]], 1.5, 1.5)
    rows = overfitting.table({"tsa": {0: rising}, "dense": {0: falling}, "old": {0: {}}}).splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in rows if "|" in row}
    assert cells["tsa"] == ["20", "1.6500", "1.6000", "2.6500", "2.6000", "40"]
    assert cells["dense"][-1] == "–"
    assert "old" not in cells


def test_runs_without_a_best_step_have_no_such_table() -> None:
    assert overfitting.table({"dense": {0: {}}}) == ""


@pytest.mark.slow
def test_both_splits_and_the_papers_way(tmp_path: Path, data_dir: Path) -> None:
    assert data_dir.is_dir()
    config = recipe(tmp_path, MODELS["token_selective_hard"], keep_best=True, batch_size=16)
    config["data"]["corpus"] = "tiny-shakespeare:80-10-10"
    folder = train(config, tmp_path / "run")
    found = overfitting.measured(folder)
    assert [step for step, *_ in found["curve"]] == [5, 10, 12]
    best = Run(folder).best()
    assert best is not None
    assert found["best"]["step"] == best["step"]
    if best["step"] == 12:
        assert found["best"]["test"] == pytest.approx(found["test"])
    whole = next(oracle for step, oracle, _ in found["curve"] if step == 12)
    assert found["random_batches"]["loss"] == pytest.approx(whole, abs=0.2)
    assert overfitting.measured(train(recipe(tmp_path, MODELS["dense"]), tmp_path / "plain")) == {}


def test_paper_size_runs_are_validated_and_keep_their_best_step() -> None:
    arm = seeded(recipes.language("paper", {"corpus": "tiny-shakespeare:80-10-10", "tokenizer": "char"}, []), 42)
    assert arm["train"]["keep_best"]
    assert arm["train"]["steps"] % arm["train"]["eval_every"] == 0
