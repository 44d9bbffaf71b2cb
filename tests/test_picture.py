"""The README's picture is up to date."""

from __future__ import annotations

import runpy
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def test_picture_is_up_to_date() -> None:
    drawn = runpy.run_path(str(ROOT / "tools" / "picture.py"))["picture"]()
    assert drawn == (ROOT / "docs" / "picture.svg").read_text(encoding="utf-8"), "run tools/picture.py docs/picture.svg"
