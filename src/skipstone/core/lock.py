"""A lock on a folder between processes, released when its process ends, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows has no flock: nothing is locked there
    fcntl = None  # type: ignore[assignment]

_held: dict[tuple[int, str], int] = {}  # open lock files by (process, path); a fork does not hold its parent's


def _close_inherited() -> None:
    """Close a fork's copies of its parent's lock files.

    A lock belongs to the open file, which a fork shares. Left open, the copy would keep the lock when the parent has
    ended, and a fork that waits for its parent's lock would wait for itself.
    """
    for file in _held.values():
        with suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_inherited)


class Busy(ValueError):
    """Error for a folder or file that another process is using."""


@contextmanager
def locked(folder: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold an exclusive lock between processes on a folder or file, which need not exist, during a `with` block.

    wait: whether to wait while another process holds the lock; if False, `Busy` (a ValueError) is raised then. A
    process may take a lock again that it already holds. The lock is a file `.NAME.lock` beside `folder`, deleted at the
    end; one that a killed process left behind locks nothing. On Windows nothing is locked.
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
        if _held.pop(key, None) is not None:  # absent in a fork that leaves its parent's block
            _release(file, path, made)


def _release(file: int, path: Path, made: list[Path]) -> None:
    """Delete the lock file and close it, which ends the lock; also delete the folders in `made` that are still empty.

    file: its descriptor. path: its path.
    """
    with suppress(OSError):
        path.unlink()  # while still locked, so that a waiting process notices that the file is gone
    os.close(file)
    for parent in made:
        with suppress(OSError):
            parent.rmdir()  # fails, as intended, if something was written into it


def _acquire(path: Path, folder: Path, wait: bool) -> int:
    """Open and lock the lock file at `path`, and return its descriptor.

    folder: what the lock protects, named in the error. wait: whether to wait while another process holds the lock; if
    False, `Busy` is raised then.
    """
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
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _make_parents(target: Path) -> list[Path]:
    """Create the folders above `target` and return those that were missing, the innermost first."""
    missing = [parent for parent in target.parents if not parent.exists()]
    target.parent.mkdir(parents=True, exist_ok=True)
    return missing
