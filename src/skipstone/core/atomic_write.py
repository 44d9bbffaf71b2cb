"""Write files and folders atomically: each is written under a temporary name, flushed to disk and renamed.

The temporary name is `.NAME.partial`. A killed process leaves it behind; the next write of the same path removes it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from skipstone.core.lock import locked
from skipstone.core.strict import PlainMapping

TEXT_OF = {
    errno.ENOSPC: "no space left",
    errno.EDQUOT: "no space left (quota)",
    errno.EIO: "the disk fails",
    errno.EROFS: "the file system is read-only",
    errno.ESTALE: "the file system is gone",
}
FOREIGN = (
    "PytorchStreamWriter",
    "iostream error",
    "basic_ios",
    "unexpected pos",
)  # in messages of torch's writer after a failed write
PRIVATE = 0o600  # the mode of files that safetensors writes, whatever the umask
UMASK = os.umask(0o077)  # there is no other way to read it
os.umask(UMASK)
FULL = 1 << 20  # bytes; with less free space than this, a failed write is blamed on a full disk


class WriteError(ValueError):
    """Error for a file that could not be written.

    The message is one line with the path and the reason. path: the file that the user asked for. reason: what went
    wrong, in words, such as "no space left".
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"cannot write {str(path)!r}: {reason}")
        self.path, self.reason = path, reason


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Turn an error of a full or failing disk, raised in a `with` block, into a `WriteError` naming `path`.

    path: the file or folder that the block writes. `WriteError` is a ValueError. Such errors are recognised by the
    messages of the operating system, torch, safetensors and tokenizers; all other errors pass unchanged. A `WriteError`
    for the temporary name of `path` is raised again with `path` itself.
    """
    try:
        yield
    except WriteError as error:
        if not error.path.is_relative_to(partial_of(path)):
            raise
        raise WriteError(path, error.reason) from error  # users know `path`, not the temporary name
    except Exception as error:
        reason = _reason(error, path)
        if reason is None:
            raise
        raise WriteError(path, reason) from error


def _reason(error: Exception, path: Path) -> str | None:
    """Return the reason in words if the error comes from a full or failing disk, else None. path: what was written."""
    if isinstance(error, OSError) and error.errno in TEXT_OF:
        return TEXT_OF[error.errno]
    text = str(error)
    if "No space left on device" in text:  # safetensors and tokenizers raise classes of their own
        return TEXT_OF[errno.ENOSPC]
    if any(word in text for word in FOREIGN):
        full = shutil.disk_usage(_existing(path)).free < FULL
        return TEXT_OF[errno.ENOSPC] if full else "the file could not be written whole"
    return None


def _existing(path: Path) -> Path:
    """Return the nearest folder above `path` that exists."""
    return next(parent for parent in path.absolute().parents if parent.is_dir())


def partial_of(path: Path) -> Path:
    """Return the temporary path `.NAME.partial` under which `path` is written before it is renamed."""
    return path.with_name(f".{path.name}.partial")


def remove(path: Path) -> None:
    """Delete the file `path`, or the folder with everything in it; do nothing where that is impossible."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def write_whole(path: Path, text: str) -> None:
    """Write or replace the text file `path` atomically: after a crash, it holds the old or the new text, never a part.

    text: the new content, written in UTF-8. Missing parent folders are created. Raises `WriteError` (a ValueError) if
    the disk is full or fails.
    """
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
    """Write or replace the JSON file `path` atomically: after a crash, it holds the old or the new object as a whole.

    value: the object, written with an indent of 2. Missing parent folders are created. Raises `WriteError` (a
    ValueError) if the disk is full or fails.
    """
    write_whole(path, json.dumps(value, indent=2) + "\n")


def check_writable(path: Path) -> None:
    """Raise an error if no file can be created at `path`, by writing and deleting a small trial file beside it.

    If folders of `path` are missing, the trial is made in the nearest one that exists. Raises the system's OSError with
    `path` as its file name, or `WriteError` (a ValueError) for a full or failing disk.
    """
    place = _existing(path)
    trial = place / f".{path.name}.trial"  # a fixed name, so that the next call removes what a killed process left
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
    """Flush a file, or a folder and everything below it, to disk (fsync), passing over what cannot be opened.

    folder: the file or folder. Files of mode 600 also get the mode that the umask gives to new files, because
    safetensors writes that mode whatever the umask.
    """
    for path in (*folder.rglob("*"), folder):
        with suppress(OSError):  # some systems cannot open folders
            if stat.S_IMODE(path.lstat().st_mode) == PRIVATE:
                path.chmod(0o666 & ~UMASK)
            file = os.open(path, os.O_RDONLY)
            try:
                os.fsync(file)
            finally:
                os.close(file)


def replace_folder(partial: Path, folder: Path) -> None:
    """Rename the finished folder `partial` to `folder`; what was at `folder` before is deleted.

    The old folder is moved aside first and deleted last, so that a crash loses neither of them.
    """
    sync(partial)
    before = folder.with_name(f".{folder.name}.before")
    remove(before)
    if folder.exists() or folder.is_symlink():
        folder.rename(before)
    partial.rename(folder)
    sync_names(folder.parent)
    remove(before)


def sync_names(folder: Path) -> None:
    """Flush the list of names of one folder to disk (fsync), so that a rename inside it survives a crash."""
    with suppress(OSError):
        file = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(file)
        finally:
            os.close(file)


def new_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Create `folder` with everything that `fill` writes into it, or not at all.

    fill: called with a temporary folder, which is renamed to `folder` after it returns and deleted if it raises. If
    `folder` exists already, it is replaced if it is empty. Raises FileExistsError for anything else there, `WriteError`
    (a ValueError) if the disk is full or fails, and whatever `fill` raises.
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
    """Return whether there is nothing at `path`, or only an empty folder."""
    if path.is_symlink() or path.is_file():
        return False
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def check_free(path: Path) -> None:
    """Raise FileExistsError unless there is nothing at `path`, or only an empty folder."""
    if not is_free(path):
        raise FileExistsError(f"output {str(path)!r} exists already; nothing is overwritten")


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """Yield a temporary path to write to, and rename it to `out` if the `with` block raises nothing.

    out: the final path of the file or folder, locked against other processes meanwhile. If the block raises, what it
    wrote is deleted. Raises FileExistsError if `out` is a file or a non-empty folder, and the ValueErrors `Busy`,
    if another process is writing it, and `WriteError`, if the disk is full or fails.
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
