"""Files and folders are written completely or not at all, and errors of the system are one line with the path."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from skipstone.core import atomic_write, checksums
from skipstone.core.atomic_write import WriteError
from skipstone.core.checksums import Damaged


def no_space(*args: Any, **kwargs: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_file_is_replaced_whole_or_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "new" / "a.json"
    atomic_write.write_whole(path, "one")
    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(WriteError, match=rf"^cannot write '{path}': no space left$"):
        atomic_write.write_whole(path, "two")
    assert path.read_text() == "one"
    assert [found.name for found in path.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, "x"), "no space left"),
        (OSError(errno.EDQUOT, "x"), "no space left (quota)"),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), "the file could not be"),
        (RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"), "the file could not be"),
        (Exception("No space left on device (os error 28)"), "no space left"),
    ],
)
def test_what_is_said_of_a_full_disk(error: Exception, reason: str, tmp_path: Path) -> None:
    with pytest.raises(WriteError) as caught, atomic_write.naming(tmp_path / "x"):
        raise error
    assert str(caught.value).startswith(f"cannot write '{tmp_path / 'x'}': {reason}")


def test_other_errors_are_left_alone(tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "x"), RuntimeError("shapes differ"), KeyError("x")):
        with pytest.raises(type(error)) as caught, atomic_write.naming(tmp_path):
            raise error
        assert caught.value is error


def test_a_place_is_tried_before_it_is_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write.check_writable(tmp_path / "deep" / "down" / "a.json")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(Path, "write_bytes", no_space)
    with pytest.raises(WriteError, match=r"a.json': no space left"):
        atomic_write.check_writable(tmp_path / "a.json")


def test_a_folder_takes_the_place_of_an_earlier_try(tmp_path: Path) -> None:
    for text in ("one", "two"):
        (tmp_path / "partial").mkdir()
        (tmp_path / "partial" / text).write_text(text)
        atomic_write.replace_folder(tmp_path / "partial", tmp_path / "model")
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["model", "model/two"]


def test_weights_may_be_read_by_whom_the_umask_allows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def saved(name: str) -> int:
        with atomic_write.complete(tmp_path / name) as partial:
            partial.mkdir()
            save_file({"weight": torch.zeros(1)}, partial / "model.safetensors")
            (partial / "run.sh").touch(0o700)
        assert (tmp_path / name / "run.sh").stat().st_mode & 0o777 == 0o700
        return (tmp_path / name / "model.safetensors").stat().st_mode & 0o777

    monkeypatch.setattr(atomic_write, "UMASK", 0o027)
    assert saved("a") == 0o640
    monkeypatch.setattr(atomic_write, "UMASK", 0o077)
    assert saved("b") == 0o600


def test_output_is_complete_or_absent(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()  # an empty folder is taken

    def leave_half() -> None:
        with atomic_write.complete(out) as partial:
            partial.mkdir()
            raise RuntimeError

    with pytest.raises(RuntimeError):
        leave_half()
    assert list(tmp_path.iterdir()) == [out]
    with atomic_write.complete(out) as partial:
        partial.mkdir()
        (partial / "a").write_text("a")
    assert (out / "a").read_text() == "a"
    with pytest.raises(FileExistsError, match="nothing is overwritten"), atomic_write.complete(out):
        pass
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("text", ["", "[]", '{"a": 3}', '{"a": {"bytes": "x", "sha256": ""}}', "\N{SNOWMAN}"])
def test_hashes_that_cannot_be_read_are_named(text: str, tmp_path: Path) -> None:
    (tmp_path / checksums.FILES).write_text(text, encoding="utf-16" if text == "\N{SNOWMAN}" else "utf-8")
    with pytest.raises(Damaged, match=r"files.json' cannot be read"):
        checksums.check(tmp_path)


def test_hashes_name_no_file_outside(tmp_path: Path) -> None:
    for name in ("../a", "/etc/passwd"):
        (tmp_path / checksums.FILES).write_text(f'{{"{name}": {{"bytes": 1, "sha256": ""}}}}')
        with pytest.raises(Damaged, match=r"names a file outside of the folder"):
            checksums.check(tmp_path)


def test_what_changes_is_named(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 9)
    assert not checksums.check(tmp_path), "no hashes yet"
    checksums.record(tmp_path)
    assert checksums.check(tmp_path)
    (tmp_path / "b").write_text("c" * 9)
    assert checksums.check(tmp_path, hash_up_to=8), "sizes alone"
    with pytest.raises(Damaged, match=r"b' is damaged or was edited: its SHA-256 differs from files.json"):
        checksums.check(tmp_path, hash_up_to=9)
    (tmp_path / "b").unlink()
    with pytest.raises(Damaged, match=r"b' is missing, but files.json lists it"):
        checksums.check(tmp_path)
