"""Commands of the README work, and links of pages lead to existing places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from pages import ROOT, Page
from test_routed import NanoBlock

README = Page("README.md")


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(README.blocks()) == 2
    names: dict[str, Any] = {"torch": torch, "Block": NanoBlock}
    for block in README.blocks():
        exec(block, names)
    assert "% of dense" in capsys.readouterr().out
    assert names["model"].config.mechanisms[0]["name"] == "mixture_of_depths"
    assert names["blocks"][1].block.seen == [16]


@pytest.mark.parametrize("name", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_files_and_pages_exist(name: str) -> None:
    assert [str(path) for path in Page(name).files() if not path.exists()] == []
    assert name != "README.md" or len(README.files()) > 10


def test_is_a_door_not_a_hall() -> None:
    assert len(README.text.splitlines()) <= 120
