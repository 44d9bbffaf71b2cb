"""The command answers at once: nothing heavy is imported before a verb needs it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"
HEAVY = ("torch", "transformers", "numpy", "datasets")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, timeout=60, env={**os.environ, "PYTHONPATH": str(SRC)}
    )


def command(*words: str) -> tuple[str, str]:
    """What the command wrote to stderr, and the heavy modules that it has loaded."""
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
    done = run("-c", code)
    return done.stderr, done.stdout.splitlines()[-1]


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["eval", "no-such-folder"]])
def test_nothing_heavy_is_imported(words: list[str]) -> None:
    assert command(*words)[1] == "heavy: []"


@pytest.mark.parametrize(("word", "says"), [("--version", "skipstone "), ("trian", "Did you mean 'train'?")])
def test_the_package_run_as_a_module_is_the_command(word: str, says: str) -> None:
    done = run("-X", "importtime", "-m", "skipstone", word)
    assert says in done.stdout + done.stderr
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert "skipstone_cli.main" in loaded
    assert not loaded & {*HEAVY}


def test_everybody_else_gets_the_auto_classes_at_once() -> None:
    code = """
import skipstone
from transformers import AutoConfig
print(type(AutoConfig.for_model("skipstone")) is skipstone.SkipstoneConfig)
print({*skipstone.__all__} <= {*dir(skipstone)})
"""
    assert run("-c", code).stdout == "True\nTrue\n"
