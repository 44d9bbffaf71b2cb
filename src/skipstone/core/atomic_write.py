"""Files and folders that appear whole: each is written aside, brought to the disk and renamed.

What is written aside is called `.NAME.partial`. A process that is killed leaves it behind, and the next one to write
the same thing removes it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skipstone.core.lock import locked
from skipstone.core.strict import PlainMapping

TEXT_OF = {errno.ENOSPC: "no space left", errno.EDQUOT: "no space left (quota)", errno.EIO: "the disk fails"}
FOREIGN = (
    "PytorchStreamWriter",
    "iostream error",
    "basic_ios",
    "unexpected pos",
)  # torch's writer, where a write failed
FULL = 1 << 20  # with fewer bytes free than that, a failed write is put down to the disk


class WriteError(ValueError):
    """The system did not write a file; the line names it and says why."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write {str(path)!r}: {reason}")
        self.path, self.reason = path, reason


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn what the system and the libraries below say of a full or failing disk into one line with `path`."""
    try:
        yield
    except WriteError as error:
        if not error.path.is_relative_to(partial_of(path)):
            raise
        raise WriteError(path, error.reason) from error  # what is written aside has a name that nobody knows
    except Exception as error:
        reason = _reason(error, path)
        if reason is None:
            raise
        raise WriteError(path, reason) from error


def _reason(error: Exception, path: Path) -> str | None:
    if isinstance(error, OSError) and error.errno in TEXT_OF:
        return TEXT_OF[error.errno]
    text = str(error)
    if "No space left on device" in text:  # of safetensors and tokenizers, which raise classes of their own
        return TEXT_OF[errno.ENOSPC]
    if any(word in text for word in FOREIGN):
        full = shutil.disk_usage(_existing(path)).free < FULL
        return TEXT_OF[errno.ENOSPC] if full else "the file could not be written whole"
    return None


def _existing(path: Path) -> Path:
    """The nearest folder above `path` that is there."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def partial_of(path: Path) -> Path:
    """Where `path` is written before it gets its name."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write or replace a text file. Raises `WriteError`, one line, where the disk is full."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = partial_of(path)
    with naming(path):
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException:
            remove(aside)
            raise


def write_json(path: Path, value: PlainMapping) -> None:
    """Write or replace a JSON file."""
    write_whole(path, json.dumps(value, indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Raise the system's OSError, or `WriteError` for a full disk, if a file cannot be made where `path` is to be."""
    place = _existing(path)
    trial = place / f".{path.name}.trial"  # always the same: the next one removes what a killed process has left
    with naming(path):
        try:
            trial.write_bytes(b".")
        except OSError as error:
            if error.filename is not None:
                error.filename = str(path)
            raise
        finally:
            remove(trial)


def sync(folder: Path) -> None:
    """Bring a folder and everything in it to the disk, as far as the system can."""
    for path in (*folder.rglob("*"), folder):
        with suppress(OSError):  # some systems let folders not be opened
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def replace_folder(partial: Path, folder: Path) -> None:
    """Give the folder `partial` its name. What has this name before is removed; it is our own, of an earlier try."""
    sync(partial)
    before = folder.with_name(f".{folder.name}.before")
    remove(before)
    if folder.exists() or folder.is_symlink():
        folder.rename(before)
    partial.rename(folder)
    sync_names(folder.parent)
    remove(before)


def sync_names(folder: Path) -> None:
    """Bring the names in a folder to the disk."""
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def new_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Make a run folder or the like with what `fill` writes into it: with everything, or not at all.

    An empty folder of that name is taken. Raises FileExistsError for anything else that is there.
    """
    partial = partial_of(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove(partial)
    with naming(folder):
        try:
            partial.mkdir()
            fill(partial)
            sync(partial)
            check_free(folder)
            if folder.is_dir():
                folder.rmdir()  # it is empty; not every system renames onto one
            partial.rename(folder)
            sync_names(folder.parent)
        except BaseException:
            remove(partial)
            raise


def is_free(path: Path) -> bool:
    """Whether there is nothing at `path` but perhaps an empty folder."""
    if path.is_symlink() or path.is_file():
        return False
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_free(path: Path) -> None:
    """Raise FileExistsError unless `is_free`."""
    if not is_free(path):
        raise FileExistsError(f"output {str(path)!r} exists already; nothing is overwritten")


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """The path of a folder or file to write, which becomes `out` when the block ends without an error.

    Raises FileExistsError if `out` is a file, or a folder with something in it; `Busy` while another process writes it.
    """
    with locked(out), naming(out):
        check_free(out)
        partial = partial_of(out)
        remove(partial)
        try:
            yield partial
            sync(partial)
            if out.is_dir():
                out.rmdir()
            partial.replace(out)
            sync_names(out.absolute().parent)
        finally:
            remove(partial)
