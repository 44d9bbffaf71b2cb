"""Locks on folders end with their process, and every command that writes a folder takes one."""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path

import pytest

from adapt.sources import save_source
from forks import awaited, fork
from skipstone.core.lock import Busy, locked
from skipstone.data.sharding import write_shards
from skipstone.model.pretrained import convert
from train.tool import held_by_another

LIMIT = 30.0  # seconds after which a fork that waits for ever is killed


def test_one_process_may_take_it_several_times(tmp_path: Path) -> None:
    folder = tmp_path / "new" / "run"
    with locked(folder), locked(folder):
        assert [path.name for path in folder.parent.iterdir()] == [".run.lock"]
    assert list(tmp_path.iterdir()) == []


def test_another_process_is_refused_until_it_ends(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with held_by_another(folder) as other:
        with pytest.raises(Busy, match=rf"'{folder}' is in use by another process \(process {other}\)"), locked(folder):
            pass
        assert (tmp_path / ".run.lock").is_file()
    with locked(folder):  # killed; what it has left locks nothing
        pass
    assert list(tmp_path.iterdir()) == []


def take(path: Path, *, wait: bool = False) -> None:
    try:
        with locked(path, wait=wait):
            pass
    except Busy:
        raise SystemExit(7) from None


def test_a_fork_does_not_hold_what_its_parent_holds(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        assert awaited(fork(lambda: take(tmp_path / "run")), LIMIT) == 7


def test_who_waits_gets_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a fork, which shares the open file of its parent's lock, and has opened the file before it is let go."""
    opened, tell = os.pipe()
    real = fcntl.flock

    def flock(file: int, how: int) -> None:
        os.write(tell, b"o")
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "run"):
        os.read(opened, 1)  # this process's own
        child = fork(lambda: take(tmp_path / "run", wait=True))
        os.read(opened, 1)
    assert awaited(child, LIMIT) == 0
    assert list(tmp_path.iterdir()) == []


def test_a_fork_that_leaves_its_parents_block_lets_nothing_go(tmp_path: Path) -> None:
    block = locked(tmp_path / "run")
    with block:
        assert awaited(fork(lambda: block.__exit__(None, None, None)), LIMIT) == 0
        assert awaited(fork(lambda: take(tmp_path / "run")), LIMIT) == 7


def test_two_conversions_and_two_preparations(tmp_path: Path) -> None:
    source, out = save_source(tmp_path / "source"), tmp_path / "out"
    lines = tmp_path / "texts.jsonl"
    lines.write_text("".join(json.dumps({"text": f"text {i}"}) + "\n" for i in range(20)))
    with held_by_another(out):
        with pytest.raises(Busy, match="in use by another process"):
            convert(source, out)
        with pytest.raises(Busy, match="in use by another process"):
            write_shards(f"jsonl:{lines}", out, tokenizer="byte", split="80-20")
    assert not out.exists()
    convert(source, out)
    assert (out / "config.json").is_file()
