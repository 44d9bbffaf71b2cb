"""Every file in examples/ runs as it stands, and prints what it promises."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def test_route_your_block(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["route_your_block.py", "2"])
    runpy.run_path(str(EXAMPLES / "route_your_block.py"), run_name="__main__")
    printed = capsys.readouterr().out
    assert "every token    loss" in printed
    assert "routed, 25 %   loss" in printed
    shown = printed.splitlines()[-1]
    assert len(shown) - shown.count("·") == int(len(shown) * 0.25)
