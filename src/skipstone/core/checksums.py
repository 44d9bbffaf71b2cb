"""Record sizes and SHA-256 hashes of a folder's files, and compare them later to detect damage before use."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from skipstone.core.atomic_write import naming
from skipstone.core.plain_text import read_object

FILES = "files.json"


class Damaged(ValueError):
    """Error for a file that is missing or differs from what was written; the message is one line and names the file."""


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of the file `path` as 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def record(folder: Path, paths: Iterable[Path] | None = None) -> None:
    """Write `files.json` into `folder`: size and SHA-256 of files, to be compared later by `check`.

    paths: the files, all inside `folder`; None means every file in it and its subfolders. `files.json` itself is left
    out.
    """
    chosen = paths if paths is not None else (path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": file_sha256(path)}
        for path in sorted(chosen)
        if path.name != FILES
    }
    with naming(folder / FILES):
        (folder / FILES).write_text(json.dumps(files, indent=1) + "\n", encoding="utf-8")


def all_but_model_cards(folder: Path) -> list[Path]:
    """Return all files below `folder` except model cards (`*.md`), which people edit and no program reads again."""
    return [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".md"]


def check(folder: Path, hash_up_to: float = float("inf"), leave_out: str | None = None) -> bool:
    """Compare the files of a folder with its `files.json`; return False if there is none, else True.

    Folders of earlier releases have none. hash_up_to: hashes are compared for files of at most this many bytes, and
    only sizes for larger files. leave_out: suffix of files whose hashes are not compared, such as ".md"; None means no
    exception. Raises `Damaged` (a ValueError) for the first file that is missing or differs, and for a `files.json`
    that cannot be read.
    """
    known = _read(folder / FILES)
    if known is None:
        return False
    for name, (size, sha256) in known.items():
        path = folder / name
        if not path.is_file():
            raise Damaged(f"{str(path)!r} is missing, but {FILES} lists it")
        if (actual := path.stat().st_size) != size:
            raise Damaged(f"{str(path)!r} is damaged: it has {actual} bytes, {FILES} says {size}")
        if size <= hash_up_to and path.suffix != leave_out and file_sha256(path) != sha256:
            raise Damaged(
                f"{str(path)!r} is damaged or was edited: its SHA-256 differs from {FILES}; if the change is yours, "
                f"remove {FILES}"
            )
    return True


def _read(path: Path) -> dict[str, tuple[int, str]] | None:
    if not path.is_file():
        return None
    try:
        values: Any = read_object(path)
        known = {name: (entry["bytes"], entry["sha256"]) for name, entry in values.items()}
        inside = all(".." not in Path(name).parts and not Path(name).is_absolute() for name in known)
        if not inside or not all(isinstance(size, int) and isinstance(text, str) for size, text in known.values()):
            raise ValueError("an entry is malformed or names a file outside of the folder")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise Damaged(f"{str(path)!r} cannot be read: {error}") from None
    return known
