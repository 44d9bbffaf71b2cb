"""Corpora that exist on every machine: the installed Python sources. Nothing is downloaded or imported."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from skipstone.data.corpus import Corpus, Documents, by_hash, parse_percent

NOT_OURS = frozenset({"site-packages", "dist-packages", "__pycache__"})
PACKAGES = ("torch", "transformers")
SPLIT = "90-5-5"


def python_stdlib(argument: str) -> Corpus:
    """Return the corpus of the running interpreter's standard library; each .py file is a document.

    Its tests are included where installed. argument: another split by hash, such as 99-0.5-0.5.
    """
    return Corpus(
        name="python-stdlib",
        description="sources of the running Python's standard library (12 to 31 MB)",
        licence="PSF-2.0",
        readers=by_hash(lambda: sources(stdlib_folder()), parse_percent(argument or SPLIT, "corpus python-stdlib")),
    )


def python_packages(argument: str) -> Corpus:
    """Return the corpus of the standard library, torch and transformers, over 100 MB.

    argument: as in `python_stdlib`.
    """
    return Corpus(
        name="python-packages",
        description="sources of the standard library and of the installed torch and transformers (over 100 MB)",
        licence="PSF-2.0, BSD-3-Clause, Apache-2.0",
        readers=by_hash(partial(_stdlib_and, PACKAGES), parse_percent(argument or SPLIT, "corpus python-packages")),
    )


def _stdlib_and(packages: tuple[str, ...]) -> Documents:
    folders = [stdlib_folder(), *map(package_folder, packages)]
    return tuple(document for folder in folders for document in sources(folder))


def stdlib_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def package_folder(name: str) -> Path:
    """Return the folder of an installed package without importing it.

    Raises FileNotFoundError if it is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"corpus python-packages needs the package {name}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def sources(folder: Path) -> Documents:
    """Return the text of the .py files below a folder, ordered by path, leaving out those that are not UTF-8.

    Raises FileNotFoundError if there is none: some distributions ship compiled files only.
    """
    documents = tuple(text for path in _python_files(folder) if (text := _utf8(path)) is not None)
    if not documents:
        raise FileNotFoundError(f"no Python sources below {folder}; this Python seems to ship compiled files only")
    return documents


def _python_files(folder: Path) -> Iterator[Path]:
    found = ((path.relative_to(folder), path) for path in folder.rglob("*.py"))
    for relative, path in sorted(found, key=lambda pair: pair[0].as_posix()):
        if not NOT_OURS.intersection(relative.parts) and path.is_file():
            yield path


def _utf8(path: Path) -> str | None:
    try:
        return path.read_bytes().decode()
    except UnicodeDecodeError:
        return None
