"""What the README tells a newcomer to type works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from test_routed import NanoBlock

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) == 2
    names: dict[str, Any] = {"torch": torch, "Block": NanoBlock}
    for block in BLOCKS:
        exec(block, names)
    assert "% of dense" in capsys.readouterr().out
    assert names["model"].config.mechanisms[0]["name"] == "mixture_of_depths"
    assert names["blocks"][1].block.seen == [16]


def test_files_and_pages_exist() -> None:
    named = [*re.findall(r"\]\(((?!http)[^)#]+)\)", README), *re.findall(r"\brecipes/[a-z_-]+\.yaml", README)]
    assert len(named) > 10
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_is_a_door_not_a_hall() -> None:
    assert len(README.splitlines()) <= 200
