"""Check what `make release` has built: `python tools/check_release.py dist`. Exits with 1 and a line for each fault.

There must be one sdist and one wheel of the version in src/skipstone/__init__.py, which has a dated heading in
CHANGELOG.md. The sdist must hold exactly the files that git tracks, the wheel exactly the files of the packages.
"""

from __future__ import annotations

import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GENERATED = {"PKG-INFO"}


def version() -> str:
    """Return the version of the package."""
    text = (ROOT / "src" / "skipstone" / "__init__.py").read_text(encoding="utf-8")
    found = re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)
    if found is None:
        raise SystemExit("src/skipstone/__init__.py names no version")
    return found[1]


def tracked() -> set[str]:
    """Return the paths of all files that git tracks."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return set(listed.splitlines())


def of_sdist(path: Path) -> set[str]:
    """Return the paths of all files in an sdist, relative to its top folder."""
    with tarfile.open(path) as archive:
        return {member.name.partition("/")[2] for member in archive if member.isfile()} - GENERATED


def of_wheel(path: Path) -> set[str]:
    """Return the paths of all files in a wheel, without those of its metadata."""
    with zipfile.ZipFile(path) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def faults(folder: Path, files: set[str], number: str) -> Iterator[str]:
    """Yield a line for each fault of the sdist and the wheel in `folder`.

    files: the paths of all files that git tracks. number: the version of the package.
    """
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    if not re.search(rf"^## \[{re.escape(number)}\] - \d{{4}}-\d\d-\d\d$", changelog, re.MULTILINE):
        yield f"CHANGELOG.md has no dated heading for {number}"
    sdist, wheel = folder / f"skipstone-{number}.tar.gz", folder / f"skipstone-{number}-py3-none-any.whl"
    packages = {file.removeprefix("src/") for file in files if file.startswith("src/")}
    for archive, read, wanted in ((sdist, of_sdist, files), (wheel, of_wheel, packages)):
        if not archive.is_file():
            yield f"{archive} is not there"
            continue
        held = read(archive)
        yield from (f"{archive.name} lacks {file}" for file in sorted(wanted - held))
        yield from (f"{archive.name} holds {file}, which git does not track" for file in sorted(held - wanted))


def main(folder: Path) -> int:
    """Print a line for each fault of the archives in `folder`; return the exit status, 1 if there are any."""
    found = list(faults(folder, tracked(), version()))
    for line in found:
        print(line, file=sys.stderr)
    if not found:
        print(f"skipstone {version()}: sdist and wheel hold what they should")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
