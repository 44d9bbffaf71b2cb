"""The command answers at once: nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
HEAVY = ("torch", "transformers", "numpy", "omegaconf", "yaml", "datasets", "skipstone")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(SRC)}
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["eval", "no-such-folder"]])
def test_nothing_heavy_is_imported(words: list[str]) -> None:
    code = f"""
import sys
import skipstone_cli.main as command
sys.argv = ["skipstone", *{words!r}]
try:
    command.main()
except SystemExit:
    pass
print("heavy:", [name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run("-c", code).stdout.splitlines()[-1] == "heavy: []"
