"""Plant each fault of `faults.toml` alone in a copy of the tree, and report whether the quick suite finds it.

    python tests/plant_faults.py                    # all faults, one after the other; known results are kept
    python tests/plant_faults.py --only "off by one"    # those whose name contains this
    python tests/plant_faults.py --check            # only: does every patch still fit the code?
    python tests/plant_faults.py --table            # the findings as a table, for docs/testing.md

A fault is found when a test fails or cannot be collected. The tests named with it run first; if they pass, the whole
quick suite runs, up to its first failure.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NoReturn

import pytest

from forks import awaited, fork

ROOT = Path(__file__).resolve().parents[1]
FINDINGS = ROOT / ".faults.json"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+\.py(?:::\w+)?)", re.MULTILINE)
UNPLACED = "the code has moved"
QUIET = ("-W", "ignore::pytest.PytestAssertRewriteWarning")  # of what was imported before pytest began


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    old: str
    new: str
    first: list[str]

    def place(self, root: Path) -> Path:
        """Return the only file that contains the line of this fault. Raises ValueError unless it occurs once."""
        found = [(path, path.read_text(encoding="utf-8").count(self.old)) for path in (root / "src").rglob("*.py")]
        places = [path for path, count in found for _ in range(count)]
        if len(places) != 1:
            raise ValueError(f"{self.name!r}: {UNPLACED}; its line stands in {len(places)} places instead of one")
        return places[0]

    @contextmanager
    def planted(self, root: Path) -> Iterator[None]:
        """The fault stands in the tree within the block."""
        path = self.place(root)
        sound = path.read_text(encoding="utf-8")
        path.write_text(sound.replace(self.old, self.new), encoding="utf-8")
        try:
            yield
        finally:
            path.write_text(sound, encoding="utf-8")


def faults(only: str | None = None) -> list[Fault]:
    known = tomllib.loads((ROOT / "tests/faults.toml").read_text(encoding="utf-8"))["fault"]
    return [fault for fault in (Fault(**entry) for entry in known) if only is None or only in fault.name]


def copied(root: Path) -> None:
    """Copy all files of the repository that git tracks or would add to `root`, and what numba has compiled of them."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)
    for path in (ROOT / "src").rglob("__pycache__/*.nb[ci]"):
        (root / path.relative_to(ROOT)).parent.mkdir(exist_ok=True)
        shutil.copy2(path, root / path.relative_to(ROOT))


def failing(root: Path, words: list[str]) -> str | None:
    """Run tests of the quick suite in `root`, and return the first that fails, or None.

    words: further arguments of pytest. They run in a fork, so that heavy imports happen once.
    """
    output = root / "pytest.out"
    code = awaited(fork(partial(_run_pytest, root, words), output))
    if code == 0:
        return None
    said = output.read_text(encoding="utf-8")
    found = FAILED.search(said)
    if code not in (1, 2) or found is None:
        raise RuntimeError(f"the tests did not run (exit code {code}):\n{said[-4000:]}")
    return found[1]


def _run_pytest(root: Path, words: list[str]) -> NoReturn:
    os.chdir(root)
    os.environ["PYTHONPATH"] = str(root / "src")
    sys.path[:0] = [str(root / "src"), str(root / "tests")]
    raise SystemExit(pytest.main(["-m", "not slow", "-x", "-q", "-p", "no:cacheprovider", *QUIET, *words]))


def tried(fault: Fault, root: Path, workers: str, near: bool) -> str | None:
    """Plant a fault in a copy of the repository, and return the test that finds it, or None.

    root: the copy, which is as before in the end. workers: number of processes for the whole suite. near: whether to
    run only the tests that are named beside the fault.
    """
    with fault.planted(root):
        first = [name for name in fault.first if (root / name).exists()]
        found = failing(root, first) if first else None
        return found or (None if near else failing(root, ["-n", workers, "--dist", "worksteal"]))


def _import_once() -> None:
    """Import the packages whose import would take most of the time of every try; none of them is ours."""
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    os.environ.update(HF_HOME=tempfile.gettempdir(), OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    for name in ("torch", "torch._dynamo", "transformers.trainer", "transformers.models.llama", "hypothesis"):
        importlib.import_module(name)


def table(findings: dict[str, str | None]) -> str:
    lines = ["| fault | planted in | found by |", "|---|---|---|"]
    for fault in faults():
        place = fault.place(ROOT).relative_to(ROOT / "src")
        found = findings.get(fault.name, "not tried")
        lines.append(f"| {fault.name} | `{place}` | {'**nothing**' if found is None else f'`{found}`'} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="part of the names of the faults to plant")
    parser.add_argument("--check", action="store_true", help="only see whether every patch fits")
    parser.add_argument("--table", action="store_true", help="print what is known")
    parser.add_argument("--near", action="store_true", help="try only the tests named beside a fault")
    parser.add_argument("--workers", default="auto", help="processes of the whole suite")
    given = parser.parse_args()
    findings: dict[str, str | None] = json.loads(FINDINGS.read_text()) if FINDINGS.exists() else {}
    if given.table:
        print(table(findings))  # noqa: T201
        return 0
    fitting = [fault for fault in faults(given.only) if _fits(fault)]
    if not given.check:
        _import_once()
        with tempfile.TemporaryDirectory(prefix="skipstone-fault-") as folder:
            copied(Path(folder))
            for fault in fitting:
                if fault.name not in findings or given.only is not None:
                    findings[fault.name] = tried(fault, Path(folder), given.workers, given.near)
                    FINDINGS.write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
                    print(f"{fault.name}: {findings[fault.name] or 'NOT FOUND'}", flush=True)  # noqa: T201
    return 1 if len(fitting) < len(faults(given.only)) or None in findings.values() else 0


def _fits(fault: Fault) -> bool:
    try:
        fault.place(ROOT)
    except ValueError as error:
        print(error)  # noqa: T201
        return False
    return True


if __name__ == "__main__":
    raise SystemExit(main())
