"""Compiled code on disk: neither stale nor damaged code is run, and no folder, or a full disk, is an error."""

from __future__ import annotations

import ast
import ctypes
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("numba")

import numba
from numba.core import caching
from numba.core.ccallback import CFunc

from skipstone.ops import kept_code
from skipstone.ops.workers import Unit

OPS = Path(kept_code.__file__).parent
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "garbage": lambda data: b"\x80garbage" * 40,
    "cut": lambda data: data[: len(data) // 2],
    "zeros": lambda data: bytes(len(data)),
    "another byte": lambda data: data[:-300] + bytes([data[-300] ^ 255]) + data[-299:],
}


def _nothing(at: int) -> None:
    return


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    return tmp_path


def hits() -> int:
    """Compile or read, call, and return whether it was read from disk."""
    made = Unit(_nothing, 1).compiled
    made.ctypes(ctypes.c_int64(0))
    return int(made.cache_hits)


def test_it_is_read_again(folder: Path) -> None:
    assert [hits(), hits()] == [0, 1]
    assert {path.suffix for path in folder.rglob("*.nb*")} == {".nbi", ".nbc"}


@pytest.mark.parametrize("suffix", ["nbi", "nbc"])
@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_files_are_compiled_anew(name: str, suffix: str, folder: Path) -> None:
    hits()
    (path,) = folder.rglob(f"*.{suffix}")
    path.write_bytes(DAMAGES[name](path.read_bytes()) if path.stat().st_size > 300 else DAMAGES[name](bytes(400)))
    assert [hits(), hits()] == [0, 1]


def test_a_change_of_any_source_compiles_anew(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hits()
    monkeypatch.setattr(kept_code, "sources", lambda: "others")
    assert [hits(), hits()] == [0, 1]


def test_no_folder_is_no_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        caching.CacheImpl if hasattr(caching, "CacheImpl") else caching._CacheImpl, "_locator_classes", []
    )
    assert [hits(), hits()] == [0, 0]
    assert kept_code.kept_njit()(lambda x: x + 1)(3) == 4


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError(13, "denied")])
def test_a_folder_that_cannot_be_written_to_any_more_is_no_error(
    error: OSError, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(caching.IndexDataCacheFile, "_open_for_write", fails)
        assert hits() == 0
    assert [hits(), hits()] == [0, 1]


def test_control_c_while_compiling_is_not_lost(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLVM calls Python back, where an exception would be printed and forgotten."""
    compiled, lost = CFunc.compile, list[BaseException]()

    def interrupted(made: CFunc) -> None:
        try:
            signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt as error:
            lost.append(error)
        compiled(made)

    unit = Unit(_nothing, 1)
    with monkeypatch.context() as patch:
        patch.setattr(CFunc, "compile", interrupted)
        with pytest.raises(KeyboardInterrupt):
            unit.compiled  # noqa: B018
    assert not lost
    assert unit.compiled.cache_hits == 1
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_every_file_that_compiled_code_consists_of_is_looked_at() -> None:
    """Followed by imports, from the files that are compiled."""
    seen, left = set[str](), [path.stem for path in OPS.glob("*_native.py")]
    while left:
        if (name := left.pop()) in seen:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse((OPS / f"{name}.py").read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("skipstone."):
                parts = [node.module or "", *(f"{node.module}.{each.name}" for each in node.names)]
                found = {part.removeprefix("skipstone.ops.") for part in parts if part.startswith("skipstone.ops.")}
                left += [each for each in found if (OPS / f"{each}.py").exists()]
    matched = {path.stem for pattern in kept_code.SOURCES for path in OPS.glob(pattern)}
    assert seen <= matched, sorted(seen - matched)
