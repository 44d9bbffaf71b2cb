"""Corpora that exist on every machine: the installed Python sources. Nothing is downloaded or imported."""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path

from skipstone.data.corpus import SPLITS, Corpus, Documents, by_hash, parse_percent

NOT_OURS = frozenset({"site-packages", "dist-packages", "__pycache__"})
PACKAGES = ("torch", "transformers")
SPLIT = "90-5-5"
OURS = "skipstone"  # packages that python-code leaves out: the text would change with this library
TEST_BYTES, VALIDATION_BYTES, MOST_OF_ONE = 5_000_000, 2_000_000, 8_000_000


def python_stdlib(argument: str) -> Corpus:
    """Return the corpus of the running Python's standard library; each .py file is a document.

    The library's tests are included if they are installed. argument: per cent of the documents for train, validation
    and test, such as "99-0.5-0.5"; "" means "90-5-5". Documents are assigned by the hash of their text. Raises
    ValueError for an argument that is not such a split. Reading raises FileNotFoundError if there are no sources.
    """
    return Corpus(
        name="python-stdlib",
        description="sources of the running Python's standard library (12 to 31 MB)",
        licence="PSF-2.0",
        readers=by_hash(lambda: sources(stdlib_folder()), parse_percent(argument or SPLIT, "corpus python-stdlib")),
    )


def python_packages(argument: str) -> Corpus:
    """Return the corpus of the standard library, torch and transformers (over 100 MB); each .py file is a document.

    argument: per cent of the documents for train, validation and test, such as "99-0.5-0.5"; "" means "90-5-5".
    Documents are assigned by the hash of their text. Raises ValueError for an argument that is not such a split.
    Reading raises FileNotFoundError if one of the packages is not installed or has no sources.
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


def python_code(argument: str) -> Corpus:
    """Return the corpus of all installed Python packages, in which every package belongs to one split as a whole.

    Each .py file is a document. Packages are assigned one by one, in the order of the SHA-256 of their names: to test
    if the package has at most 2.5 MB and test has less than 5 MB, else to validation if the package has at most 1 MB
    and validation has less than 2 MB, else to train. The standard library belongs to train. A package contributes at
    most 8 MB. Skipstone is left out. argument: not used.
    """
    assigned = cache(_by_package)
    return Corpus(
        name="python-code",
        description="sources of the standard library and of all installed packages, split by package",
        licence="each package's own",
        readers={split: partial(_of_split, assigned, split) for split in SPLITS},
    )


def _of_split(assigned: Callable[[], dict[str, list[Path]]], split: str) -> Documents:
    return tuple(text for path in assigned()[split] if (text := _utf8(path)) is not None)


def _by_package() -> dict[str, list[Path]]:
    """Return the .py files of each split of `python_code`, so that every package belongs to one split."""
    site = Path(sysconfig.get_paths()["purelib"])
    folders = {path.name: path for path in site.iterdir() if path.is_dir() and "." not in path.name}
    files = {name: _at_most(path, MOST_OF_ONE) for name, path in folders.items() if not name.startswith(OURS)}
    sizes = {name: sum(size for _, size in found) for name, found in files.items() if found}
    splits: dict[str, list[Path]] = {split: [] for split in SPLITS}
    filled = dict.fromkeys(SPLITS, 0)
    wanted = {"test": TEST_BYTES, "validation": VALIDATION_BYTES}
    for name in sorted(sizes, key=lambda name: _hash(name)):
        fits = (split for split, size in wanted.items() if filled[split] < size and sizes[name] <= size // 2)
        split = next(fits, "train")
        filled[split] += sizes[name]
        splits[split] += [path for path, _ in files[name]]
    splits["train"] += [path for path, _ in _at_most(stdlib_folder(), MOST_OF_ONE)]
    return splits


def _at_most(folder: Path, most: int) -> list[tuple[Path, int]]:
    """Return .py files of a package with their sizes in bytes, as many as fit into `most` bytes together.

    They are taken in the order of the hash of their paths; those that do not fit are passed over.
    """
    found: list[tuple[Path, int]] = []
    total = 0
    for path in sorted(_python_files(folder), key=lambda path: _hash(path.relative_to(folder).as_posix())):
        size = path.stat().st_size
        if total + size <= most:
            total += size
            found.append((path, size))
    return found


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()


def stdlib_folder() -> Path:
    """Return the folder of the running interpreter's standard library."""
    return Path(sysconfig.get_paths()["stdlib"])


def package_folder(name: str) -> Path:
    """Return the folder of the installed package `name` without importing it.

    Raises FileNotFoundError if it is not installed.
    """
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"corpus python-packages needs the package {name}, which is not installed")
    return Path(spec.submodule_search_locations[0])


def sources(folder: Path) -> Documents:
    """Return the text of each .py file below a folder, as a tuple ordered by path.

    Files that are not UTF-8, and folders called site-packages, dist-packages and __pycache__, are left out. Raises
    FileNotFoundError if there is no file left: some Python distributions contain compiled files only.
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
