"""Every option of every verb is told in docs/, on a page that shows the verb."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer
from typer.main import get_command

from skipstone_cli import main

ROOT = Path(__file__).resolve().parents[2]
PAGES = {path.name: path.read_text(encoding="utf-8") for path in (ROOT / "docs").glob("*.md") if path.stem != "log"}
COMMAND = get_command(main.app)
assert isinstance(COMMAND, typer.core.TyperGroup)
VERBS = {name: verb for name, verb in COMMAND.commands.items() if not verb.hidden}


@pytest.mark.parametrize("name", sorted(VERBS))
def test_every_option_is_documented(name: str) -> None:
    pages = [text for text in PAGES.values() if f"skipstone {name}" in text]
    assert pages
    options = [option for found in VERBS[name].params for option in found.opts if option.startswith("--")]
    missing = [
        option
        for option in options
        if option != "--help" and not any(re.search(rf"{option}(?![\w-])", text) for text in pages)
    ]
    assert not missing
