"""The code of docs/route.md runs unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pages import Page


@pytest.mark.filterwarnings("ignore::UserWarning")  # eight steps: thresholds that have hardly moved
def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for block in Page("docs/route.md").blocks():
        exec(block, names)
    assert "% of tokens times blocks" in capsys.readouterr().out
    assert [entry.plain() for entry in names["again"].entries] == [entry.plain() for entry in names["routed"].entries]
