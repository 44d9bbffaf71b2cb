"""Checks that paths exist or can be written, before anything heavy is imported, so that mistakes are told at once."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from skipstone_cli.errors import UserError


def existing_dir(path: Path, what: str) -> Path:
    """Return `path` if it is a folder, and raise UserError otherwise.

    what: the name of the path, for the message.
    """
    if not path.exists():
        raise UserError(f"{what} {str(path)!r} does not exist")
    if not path.is_dir():
        raise UserError(f"{what} {str(path)!r} is a file, but a folder is expected")
    return path


def existing_file(path: Path, what: str) -> Path:
    """Return `path` if it is a file, and raise UserError otherwise.

    what: the name of the path, for the message.
    """
    if not path.exists():
        raise UserError(f"{what} {str(path)!r} does not exist")
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise UserError(f"{what} {str(path)!r} is {kind}, but a file is expected")
    return path


def places_for_folders(places: Mapping[str, Path | None]) -> None:
    """Raise an error for a path that is no folder in which files can be created, and cannot become one.

    places: the paths, by the names of their options, which messages show; paths that are None are left out. Raises
    UserError for a path below a file, and OSError or `WriteError` for one in which nothing can be written.
    """
    from skipstone.core.atomic_write import check_writable

    for option, path in places.items():
        if path is not None:
            nearest = next(place for place in (path, *path.absolute().parents) if place.exists() or place.is_symlink())
            if not nearest.is_dir():
                raise UserError(f"{option} {str(path)!r} must be a folder, but {str(nearest)!r} is a file")
            check_writable(path / "trial")


def existing_run(path: Path) -> Path:
    """Return `path` if it is a run folder or the folder of a saved model.

    Raises UserError if there is no such folder, and ValueError if it holds neither.
    """
    from skipstone.runs import Run

    return Run(existing_dir(path, "run folder")).folder


def existing_source(source: str) -> str:
    """Return `source`; raise UserError if it is a path that does not exist.

    Anything that may be a Hub name is accepted.
    """
    path = Path(source).expanduser()
    is_path = source.startswith((".", "/", "~")) or source.count("/") > 1 or "\\" in source or path.suffix == ".gguf"
    if is_path and not path.exists():
        raise UserError(f"source {source!r} does not exist")
    return source


def new_path(path: Path, what: str) -> Path:
    """Return `path` if it does not exist, and raise UserError otherwise, because files are never overwritten.

    what: the name of the path, for the message.
    """
    if path.exists() or path.is_symlink():
        raise UserError(
            f"{what} {str(path)!r} exists already and nothing is overwritten; name another path or remove it"
        )
    return path
