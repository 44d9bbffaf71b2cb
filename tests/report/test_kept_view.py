"""A report's data about a model are kept with the run, and computed again for another model or recipe."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from skipstone.core import checksums
from skipstone.measure.trace import trace_tokens
from skipstone.report.rendering import write_report
from skipstone.runs import Run


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    return shutil.copytree(runs["routed"], tmp_path / "routed")


def never(*args: Any, **kwargs: Any) -> None:
    raise AssertionError("the model was loaded")


def page(run: Path, name: str) -> str:
    return write_report([run], run.parent / name).read_text(encoding="utf-8")


def test_a_report_of_a_finished_run_loads_no_model(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Run, "load_model", never)
    kept = page(run, "kept.html")
    assert "mixture of depths on blocks 1" in kept
    monkeypatch.undo()
    (run / "view.json").unlink()
    assert page(run, "anew.html") == kept
    assert (run / "view.json").is_file(), "what was made is kept"


def test_the_command_that_reports_on_finished_runs_loads_no_torch(run: Path) -> None:
    code = f"""
import sys
import skipstone_cli.main as command
sys.argv = ["skipstone", "report", {str(run)!r}, "--out", {str(run.parent / "page.html")!r}]
try:
    command.main()
finally:
    print("heavy:", [name for name in ("torch", "transformers", "numpy") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=240)
    assert done.stdout.endswith("heavy: []\n"), done.stderr
    assert (run.parent / "page.html").is_file()


def test_other_weights_are_looked_at_anew(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = page(run, "before.html")
    file = run / "model" / "model.safetensors"
    changed = {name: weight + torch.randn_like(weight) for name, weight in load_file(file).items()}
    save_file(changed, file, metadata={"format": "pt"})
    checksums.record(file.parent, [file])
    assert Run(run).kept_view() is None
    assert page(run, "after.html") != before
    monkeypatch.setattr(Run, "load_model", never)
    page(run, "again.html")


@pytest.mark.parametrize(
    "text", ["", *(pytest.param(text, marks=pytest.mark.slow) for text in ("[]", "{}")), '{"sha256": 1, "view": {}}']
)
def test_a_damaged_file_is_written_anew(run: Path, text: str) -> None:
    kept = json.loads((run / "view.json").read_text(encoding="utf-8"))
    (run / "view.json").write_text(text, encoding="utf-8")
    page(run, "page.html")
    assert json.loads((run / "view.json").read_text(encoding="utf-8")) == kept


def test_a_view_of_another_format_is_made_anew(run: Path) -> None:
    kept = json.loads((run / "view.json").read_text(encoding="utf-8"))
    (run / "view.json").write_text(json.dumps({**kept, "view": {**kept["view"], "format": 0}}), encoding="utf-8")
    page(run, "page.html")
    assert json.loads((run / "view.json").read_text(encoding="utf-8")) == kept


def test_the_model_of_a_run_is_left_as_it_was(runs: dict[str, Path]) -> None:
    run = Run(runs["routed"])
    trained = run.load_model().train()
    data = run.data()
    trace_tokens(trained, data.collate([data.validation[0]]), ["a"])
    assert trained.training
