"""Long commands in a real terminal: a bar on stderr, and nothing of it in what they print."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).resolve().parents[2] / "src"


def in_terminal(*words: str) -> tuple[int, str, str]:
    """Run the command with a terminal as its stderr; return its status, what it printed, and what the terminal got."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(SRC), "TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, "-m", "skipstone", *words]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs, text=True, env=environment) as process:
        os.close(theirs)
        told = b""
        while True:
            try:
                part = os.read(ours, 1 << 16)
            except OSError:  # how Linux tells that the other side is closed
                break
            if not part:
                break
            told += part
        assert process.stdout is not None
        printed = process.stdout.read()
    os.close(ours)
    return process.returncode, printed, told.decode()


@pytest.mark.slow
def test_prepare_shows_a_bar_and_its_shards(tmp_path: Path) -> None:
    lines = [json.dumps({"text": f"document {i} with some words to read"}) for i in range(400)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines), encoding="utf-8")
    words = ("prepare", f"jsonl:{tmp_path / 'd.jsonl'}", "--split", "80-20", "--shard-tokens", "4000")
    status, printed, told = in_terminal(*words, "--out", str(tmp_path / "shards"))
    assert status == 0, told
    assert printed.endswith(f"shards: {tmp_path / 'shards'}\n")
    assert "bytes of JSON" in told
    assert "\N{BOX DRAWINGS HEAVY HORIZONTAL}" in told
    assert told.count("train: ") > 1, "a line for each shard, above the bar"
