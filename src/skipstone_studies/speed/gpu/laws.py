"""Part of the GPU study: the tests of `tests/laws` on the device, as one run of pytest.

These tests state what holds for every model, such as causality. Each outcome is stored as soon as pytest prints it.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import deque
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from skipstone.core.strict import PlainDict
from skipstone_studies.speed.gpu.bench import Bench

TESTS = Path(__file__).resolve().parents[4] / "tests"
NAMED = 3  # cases that failed and are named
WIDTH = 120  # characters of a name
ALONE = re.compile(r"tests/laws/test_(\w+)\.py::(.*?) (PASSED|FAILED|ERROR)\b")
BY_WORKER = re.compile(r"(PASSED|FAILED|ERROR) .*?tests/laws/test_(\w+)\.py::(.*)")  # as pytest-xdist prints it


def measure(bench: Bench) -> None:
    """Run the tests in `tests/laws` on the device, and count for each file the cases that passed and failed.

    bench: gives the device, and stores {"passed", "failed", "of": names of the first three failed cases} for each file,
    after every case, so that a part that is stopped keeps its counts. Raises ValueError without the tests or pytest,
    and with pytest's last output if no case has run.
    """
    if not TESTS.is_dir():
        raise ValueError("tests/laws is not here: run it from a checkout")
    if find_spec("pytest") is None:
        raise ValueError("pytest is not installed")
    last: deque[str] = deque(maxlen=8)
    for file, case, passed in _outcomes(bench, last):
        counts = bench.found.setdefault(f"test_{file}.py", {"passed": 0, "failed": 0, "of": ""})
        counts["passed" if passed else "failed"] += 1
        if not passed and counts["failed"] <= NAMED:
            counts["of"] += ("; " if counts["of"] else "") + case[:WIDTH]
        bench.write()
    if not bench.found:
        raise ValueError(" ".join(" ".join(last).split())[-250:])


def command(sizes: PlainDict) -> list[str]:
    """Return the command line that runs the tests in `tests/laws`.

    sizes: a mapping with "files" (names without `test_` and `.py`), "cases" (an expression for pytest's -k; "" means
    all) and "workers" (number of parallel processes; 0: none besides pytest's own).
    """
    files = [f"tests/laws/test_{file}.py" for file in sizes["files"]]
    parallel = ["-n", str(sizes["workers"])] if sizes["workers"] and find_spec("xdist") is not None else []
    chosen = ["-k", sizes["cases"]] if sizes["cases"] else []
    # Warnings are errors in the tests; those of another release of torch than the tests know are not about laws.
    plain = ["-m", "not slow", "-v", "-p", "no:cacheprovider", "-W", "ignore", "--color=no"]
    return [sys.executable, "-m", "pytest", *files, *plain, *parallel, *chosen]


def _outcomes(bench: Bench, last: deque[str]) -> Iterator[tuple[str, str, bool]]:
    """Run the tests, and yield file, name and success of every case as it ends.

    last: a queue to which every printed line is appended.
    """
    environment = {**os.environ, "SKIPSTONE_TEST_DEVICE": bench.device.type, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command(dict(bench.sizes)),
        cwd=TESTS.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as running:
        assert running.stdout is not None
        for line in running.stdout:
            last.append(line.strip())
            if found := ALONE.search(line):
                yield found[1], found[2], found[3] == "PASSED"
            elif found := BY_WORKER.search(line):
                yield found[2], found[3].strip(), found[1] == "PASSED"
