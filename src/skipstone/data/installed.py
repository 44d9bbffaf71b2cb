"""Corpora that are on every machine: the Python sources installed there. Nothing is downloaded, nothing is imported."""

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
    """Every .py file of the running interpreter's standard library (its tests too, where installed) is a document.

    argument: another split by hash, as 99-0.5-0.5.
    """
    return Corpus(
        name="python-stdlib",
        description="sources of the running Python's standard library (12 to 31 MB)",
        licence="PSF-2.0",
        readers=by_hash(lambda: sources(stdlib_folder()), parse_percent(argument or SPLIT, "corpus python-stdlib")),
    )


def python_packages(argument: str) -> Corpus:
    """The standard library and the installed torch and transformers: more than 100 MB. argument: as there."""
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
    return Path(sysconfig.get_paths()["stdlib"])


def package_folder(name: str) -> Path:
    """Where package `name` is installed, found without importing it. Raises FileNotFoundError when it is not."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"corpus python-packages needs the package {name}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def sources(folder: Path) -> Documents:
    """The .py files below `folder`, ordered by path. Files that are not UTF-8 (tests of the tokenizer) are left out.

    Raises FileNotFoundError when there is none: some distributions ship compiled files only.
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
