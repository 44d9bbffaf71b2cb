"""`evaluate` at budgets, and the budget table beside a run's weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from generate.folders import MOD, TSA, text_data, write_run
from skipstone.budget import BudgetTable
from skipstone.evaluate.budget_curve import calibrate_run
from skipstone.evaluate.evaluation import evaluate
from skipstone.generate.text_generation import stream_text
from skipstone.report.rendering import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    return write_run(root / "run", text_data(root / "text"), [TSA])


def test_the_table_of_budgets(run: Path) -> None:
    plain = evaluate(run, batch_size=4)
    found = evaluate(run, batch_size=4, budgets=[0.6])
    trained, *points = found.budgets
    assert (trained.target, trained.loss) == (None, pytest.approx(plain.measured["executed"].loss))
    assert trained.realised == pytest.approx(plain.flops.needed / plain.flops.dense, rel=0.02)
    for point in points:
        assert point.realised == pytest.approx(point.target, rel=0.1)
        assert point.counted_per_token > point.flops_per_token, "shorter rows are filled up"
        assert abs(point.loss - trained.loss) > 1e-3
    assert found.measured["executed"].loss == plain.measured["executed"].loss
    assert f"| 60.0 % | {100 * points[0].realised:.1f} % |" in found.markdown()
    assert "calibrated on" in found.markdown()
    assert json.loads(json.dumps(found.to_dict()))["budgets"][1]["target"] == 0.6
    assert plain.to_dict()["budgets"] == []
    assert "budget" not in plain.markdown()


@pytest.mark.slow
def test_a_row_at_a_time_is_filled_up_by_nothing(run: Path) -> None:
    one = evaluate(run, batch_size=1, budgets=[0.6]).budgets[1]
    assert one.counted_per_token == pytest.approx(one.flops_per_token, rel=0.02)  # the first batches, and all of them


@pytest.mark.slow
def test_rows_that_are_evaluated_are_not_calibrated_on(run: Path) -> None:
    calibrated = evaluate(run, budgets=[0.7]).budget_table
    assert "text" in calibrated
    assert calibrated.endswith(", train")
    assert evaluate(run, split="train", budgets=[0.7]).budget_table.endswith(", validation")


@pytest.mark.usefixtures("coarse_tables")
def test_a_dial_is_written_once_and_used(run: Path, tmp_path: Path) -> None:
    import shutil

    copy = shutil.copytree(run, tmp_path / "copy")
    with pytest.raises(FileNotFoundError, match=r"has no budget\.json"):
        stream_text(copy, "für ", max_new_tokens=2, budget=0.6)
    written = calibrate_run(copy, rows=6)
    assert written.path == copy / "model" / "budget.json"
    assert written.budget_table == BudgetTable.load(copy / "model")
    assert written.budget_table.rows == 6
    assert f"| {100 * written.budget_table.points[0].share:.1f} % | 0.0 % | 0.0 % | 0.0 % |" in written.markdown()
    assert evaluate(copy, budgets=[0.6]).budget_table == str(written.budget_table)
    assert "".join(piece.text for piece in stream_text(copy, "für ", max_new_tokens=4, budget=0.6, greedy=True))
    with pytest.raises(ValueError, match="out of reach"):
        stream_text(copy, "für ", budget=0.01)
    with pytest.raises(FileExistsError, match="nothing is overwritten"):
        calibrate_run(copy)


@pytest.mark.slow
def test_a_saved_model_needs_a_corpus(run: Path, tmp_path: Path) -> None:
    import shutil

    saved = shutil.copytree(run / "model", tmp_path / "model")
    with pytest.raises(ValueError, match="name the corpus to calibrate on"):
        calibrate_run(saved)
    corpus = f"text:{run.parent / 'text'}"
    assert calibrate_run(saved, corpus=corpus, context=24).path == saved / "budget.json"


@pytest.mark.slow
def test_what_cannot_be_set_is_told_before_anything_is_measured(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"budget 1\.5 is out of reach: this model can execute from"):
        evaluate(run, budgets=[0.6, 1.5])
    dense = write_run(tmp_path / "dense", text_data(tmp_path / "text"), [])
    with pytest.raises(ValueError, match="this model has no mechanism"):
        evaluate(dense, budgets=[0.6])


@pytest.mark.slow
def test_the_curve_is_in_the_report(run: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(evaluate(run, budgets=[0.6, 0.8]).to_dict()), encoding="utf-8")
    (run / "environment.json").write_text("{}", encoding="utf-8")
    (run / "metrics.jsonl").write_text("", encoding="utf-8")
    text = write_report([run], tmp_path / "r.html", evaluations=[file]).read_text(encoding="utf-8")
    assert "<h2>Loss by budget</h2>" in text
    assert '<td class="n">as trained</td>' in text
    assert text.count("<title>run</title>") == 4, "a line and three dots"
    without = write_report([run], tmp_path / "w.html").read_text(encoding="utf-8")
    assert "Loss by budget" not in without
    other = write_run(tmp_path / "other", text_data(tmp_path / "text"), [MOD])
    with pytest.raises(ValueError, match=r"is of run 'run', which is not on this page \(runs: other\)"):
        write_report([other], tmp_path / "o.html", evaluations=[file])
    with pytest.raises(ValueError, match="is on this page more than once"):
        write_report([run, run], tmp_path / "o.html", evaluations=[file])
    for content in ("{}", "[1]", "x", '{"run": "run", "budgets": []}', '{"run": "run", "budgets": [{"asked": 1}]}'):
        file.write_text(content, encoding="utf-8")
        with pytest.raises(ValueError, match="has no budgets"):
            write_report([run], tmp_path / "o.html", evaluations=[file])
