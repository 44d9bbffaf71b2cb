"""The code of docs/budget.md runs."""

from __future__ import annotations

from typing import Any

import pytest

from pages import Page
from skipstone_cli.main import VERBS

PAGE = Page("docs/budget.md")


@pytest.mark.slow
def test_python_runs(capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, Any] = {}
    exec(PAGE.block("skipstone.calibrate"), names)
    assert names["text"].shape == (1, 11)
    assert "calibrated on 16 rows of 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize("verb", ["calibrate", "eval", "generate", "report"])
def test_commands_are_there(verb: str) -> None:
    place = "runs/mod" if verb == "calibrate" else ""  # the page has another calibrate, with a KL budget
    assert PAGE.command(f"skipstone {verb} {place}")[1] in VERBS
