"""The environment in which a run was trained: versions, commit and machine, for its environment.json."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

from skipstone import __version__
from skipstone.core.strict import PlainDict

PACKAGE = Path(__file__).resolve().parents[1]


def describe(seed: int) -> PlainDict:
    """Return the contents of a run's environment.json: versions, commit, machine, seed, command and processes.

    Keys: `skipstone`, `torch`, `transformers` and `python` (their versions); `git_commit` and `git_dirty` (whether the
    checkout has uncommitted changes), both None if the package is not in a git checkout; `machine` (the dict that
    `machine()` returns); `seed`; `started` (UTC, ISO 8601), `command` and `processes`. seed: the seed of the run.
    """
    import torch
    import transformers

    commit, dirty = git_state(PACKAGE)
    return {
        "skipstone": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "git_commit": commit,
        "git_dirty": dirty,
        "machine": machine(),
        "seed": seed,
        **session(),
    }


def session() -> PlainDict:
    """Return this process's start time and command, and the number of processes that train together.

    Keys: `started` (UTC, ISO 8601), `command`, `processes` (the environment variable WORLD_SIZE, or 1).
    """
    started = datetime.now(UTC).isoformat(timespec="seconds")
    return {"started": started, "command": shlex.join(sys.argv), "processes": int(os.environ.get("WORLD_SIZE", "1"))}


def machine() -> PlainDict:
    """Return the processor, core count, torch thread count and GPU of this machine.

    Keys: `cpu`, `cores`, `threads`, `gpu` (None without one). With a GPU also `fp32_products`, torch's precision of
    fp32 matrix products: "highest" is fp32 itself, without TF32.
    """
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    found = {"cpu": _cpu(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu}
    return found if gpu is None else {**found, "fp32_products": torch.get_float32_matmul_precision()}


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Return the commit of the git checkout that tracks `folder`, and whether the checkout has uncommitted changes.

    The commit is its full hash. Returns (None, None) if no checkout tracks the folder's __init__.py or git is not
    installed.
    """
    if _git(folder, "ls-files", "--error-unmatch", "__init__.py") is None:
        return None, None
    commit = _git(folder, "rev-parse", "HEAD")
    status = _git(folder, "status", "--porcelain")
    return commit, None if status is None else bool(status)


def _git(folder: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
