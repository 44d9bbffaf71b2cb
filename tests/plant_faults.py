"""Plant each fault of `faults.toml` alone in a copy of the tree and see whether the quick suite finds it.

    python tests/plant_faults.py                    # all faults, one after the other; what is known is not tried again
    python tests/plant_faults.py --only "off by one"    # those whose name contains this
    python tests/plant_faults.py --check            # only: does every patch still fit the code?
    python tests/plant_faults.py --table            # the findings as a table, for docs/testing.md

A fault is found when a test fails or cannot be collected. The tests named beside it are tried first; if they pass, the
whole quick suite is, up to its first failure.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FINDINGS = ROOT / ".faults.json"
FAILED = re.compile(r"^(?:FAILED|ERROR) (\S+\.py(?:::\w+)?)", re.MULTILINE)
UNPLACED = "the code has moved"


@dataclass(frozen=True, kw_only=True)
class Fault:
    name: str
    old: str
    new: str
    first: list[str]

    def place(self, root: Path) -> Path:
        """The one file that the fault is planted in. Raises ValueError where that is not one place."""
        found = [(path, path.read_text(encoding="utf-8").count(self.old)) for path in (root / "src").rglob("*.py")]
        places = [path for path, count in found for _ in range(count)]
        if len(places) != 1:
            raise ValueError(f"{self.name!r}: {UNPLACED}; its line stands in {len(places)} places instead of one")
        return places[0]

    def plant(self, root: Path) -> None:
        path = self.place(root)
        path.write_text(path.read_text(encoding="utf-8").replace(self.old, self.new), encoding="utf-8")


def faults(only: str | None = None) -> list[Fault]:
    known = tomllib.loads((ROOT / "tests/faults.toml").read_text(encoding="utf-8"))["fault"]
    return [fault for fault in (Fault(**entry) for entry in known) if only is None or only in fault.name]


def copied(root: Path) -> None:
    """All files that git knows or would take."""
    words = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    for name in filter(None, subprocess.run(words, capture_output=True, text=True, check=True).stdout.split("\0")):
        if (ROOT / name).is_file():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, root / name)


def failing(root: Path, words: list[str]) -> str | None:
    """The first test of the quick suite that fails, or None."""
    command = [sys.executable, "-m", "pytest", "-m", "not slow", "-x", "-q", "-p", "no:cacheprovider", *words]
    environment = {**os.environ, "PYTHONPATH": str(root / "src"), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    found = FAILED.search(done.stdout)
    if done.returncode not in (1, 2) or found is None:
        raise RuntimeError(f"the tests did not run:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return found[1]


def tried(fault: Fault, workers: str) -> str | None:
    """The test that finds the fault, or None."""
    with tempfile.TemporaryDirectory(prefix="skipstone-fault-") as folder:
        root = Path(folder)
        copied(root)
        fault.plant(root)
        first = [name for name in fault.first if (root / name).exists()]
        found = failing(root, first) if first else None
        return found or failing(root, ["-n", workers, "--dist", "worksteal"])


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
    parser.add_argument("--workers", default="auto", help="processes of the whole suite")
    given = parser.parse_args()
    findings: dict[str, str | None] = json.loads(FINDINGS.read_text()) if FINDINGS.exists() else {}
    if given.table:
        print(table(findings))  # noqa: T201
        return 0
    missing = 0
    for fault in faults(given.only):
        try:
            fault.place(ROOT)
        except ValueError as error:
            missing += 1
            print(error)  # noqa: T201
            continue
        if given.check or (fault.name in findings and given.only is None):
            continue
        findings[fault.name] = tried(fault, given.workers)
        FINDINGS.write_text(json.dumps(findings, indent=1) + "\n", encoding="utf-8")
        print(f"{fault.name}: {findings[fault.name] or 'NOT FOUND'}", flush=True)  # noqa: T201
    return 1 if missing or None in findings.values() else 0


if __name__ == "__main__":
    raise SystemExit(main())
