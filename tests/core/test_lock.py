"""Locks on folders end with their process, and every command that writes a folder takes one."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from adapt.sources import save_source
from skipstone.core.lock import Busy, locked
from skipstone.data.sharding import write_shards
from skipstone.model.pretrained import convert
from train.tool import held_by_another


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


def test_a_fork_does_not_hold_what_its_parent_holds(tmp_path: Path) -> None:
    with locked(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            try:
                with locked(tmp_path / "run"):
                    os._exit(0)
            except Busy:
                os._exit(7)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_who_waits_gets_it(tmp_path: Path) -> None:
    done, tell = os.pipe()
    with locked(tmp_path / "run"):
        child = os.fork()
        if child == 0:
            with locked(tmp_path / "run", wait=True):
                os.write(tell, b"inside")
            os._exit(0)
    assert os.read(done, 6) == b"inside"
    assert os.waitpid(child, 0)[1] == 0
    assert list(tmp_path.iterdir()) == []


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
