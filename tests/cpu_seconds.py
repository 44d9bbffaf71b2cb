"""How many seconds of CPU the tests took, by folder: `--cpu-seconds`, which `make test` and `make test-all` give.

The clock says little on a machine that does other things as well; seconds of CPU, the children's included, say what a
test costs. Nothing fails for being slow: the lines show where the budget of `docs/testing.md` goes.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import PurePosixPath
from typing import Any

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cpu-seconds", action="store_true", help="show seconds of CPU by folder at the end")
    parser.addoption("--cpu-files", type=int, default=0, metavar="N", help="and those of the N dearest files and tests")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--cpu-seconds"):
        config.pluginmanager.register(CpuSeconds(config))


def used() -> float:
    """Return the CPU seconds of this process and of its children that have ended."""
    return sum(os.times()[:4])


class CpuSeconds:
    """A pytest plugin that notes the CPU seconds of each phase of each test, and prints their sums by folder."""

    def __init__(self, config: pytest.Config):
        self.config, self.last = config, used()
        self.start_s = 0.0  # of all processes until their first test
        self.tests: Counter[str] = Counter()

    def pytest_collection_finish(self) -> None:
        self.last = self.start_s = used()
        if hasattr(self.config, "workeroutput"):
            self.config.workeroutput["cpu_start_s"] = self.start_s

    def pytest_testnodedown(self, node: Any) -> None:
        self.start_s += getattr(node, "workeroutput", {}).get("cpu_start_s", 0.0)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Any:
        report = yield
        now = used()
        report.cpu_s, self.last = now - self.last, now
        return report

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.tests[report.nodeid] += report.cpu_s

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        files: Counter[str] = Counter()
        for name, seconds in self.tests.items():
            files[name.partition("::")[0]] += seconds
        folders: Counter[str] = Counter()
        for name, seconds in files.items():
            folders["/".join(PurePosixPath(name).parts[1:-1]) or "."] += seconds
        total = self.start_s + self.tests.total()
        shown = ", ".join(f"{name} {seconds:.0f}" for name, seconds in folders.most_common())
        terminalreporter.write_line(f"CPU: {total:.0f} s: imports and collection {self.start_s:.0f}, {shown}")
        for counted in (files, self.tests):
            for name, seconds in counted.most_common(self.config.getoption("--cpu-files")):
                terminalreporter.write_line(f"{seconds:8.2f} s  {name}")
