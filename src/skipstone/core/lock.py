"""A lock on a folder between processes. It ends with the process that holds it, however that process ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: there, two processes on one folder are not told apart
    fcntl = None  # type: ignore[assignment]

_held: dict[tuple[int, str], int] = {}  # by process (a fork holds nothing of its parent's) and folder: how often


class Busy(ValueError):
    """Another process is at work on the folder."""


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of `folder` (or of a file), which need not exist yet. A process may take a lock several times.

    The lock is a file beside the folder, `.NAME.lock`, that is removed in the end. A file that a killed process has
    left behind locks nothing. Raises `Busy`, one line, while another process holds it, unless told to wait for it.
    """
    target = folder.absolute()
    key = (os.getpid(), str(target))
    if fcntl is None or key in _held:
        yield
        return
    path, made = target.with_name(f".{target.name}.lock"), _make_parents(target)
    file = _acquire(path, folder, wait)
    _held[key] = file
    try:
        yield
    finally:
        del _held[key]
        with suppress(OSError):
            path.unlink()  # while it is still locked: whoever waits for it notices that it is gone
        os.close(file)
        for parent in made:
            with suppress(OSError):
                parent.rmdir()  # it holds something by now, unless nothing was begun


def _acquire(path: Path, folder: Path, wait: bool) -> int:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            owner = os.pread(file, 20, 0).decode("ascii", "replace").strip()
            os.close(file)
            by = f" (process {owner})" if owner else ""
            raise Busy(f"{str(folder)!r} is in use by another process{by}; wait for its end or stop it") from None
        if _is_at(file, path):
            os.ftruncate(file, 0)
            os.pwrite(file, f"{os.getpid()}\n".encode(), 0)
            return file
        os.close(file)  # its owner has just removed it


def _is_at(file: int, path: Path) -> bool:
    """Whether the open file is still the one with this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _make_parents(target: Path) -> list[Path]:
    """Folders above `target` that had to be made, the innermost first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing
