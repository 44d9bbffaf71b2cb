"""Run a part of the GPU study in a process of its own, under its limit of time."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from skipstone_studies.study import Figures, RecipeDict

LAST_WORDS = 300  # characters of a process's standard error that are kept
RAISED = re.compile(r"[\w.]*(Error|Exception|Interrupt|Exit)\b")  # the last line of a traceback
GRACE = 3.0  # seconds between asking a part to end and killing it


def measured(recipe: RecipeDict) -> Figures:
    """Run one part of the GPU study in its own process, and return what it has measured when it ended or was stopped.

    recipe: an entry of `parts.arms` with a key "seed". Keys of the result: `seconds` that the part took; `limit`, the
    seconds that it may take; numbers of measurements that were `measured`, that `failed` with an error (a part that
    ended early counts as one more) and that are `wrong` (differ from their reference by more than the tolerance, or
    have failed tests); `device`, the name of the GPU or "cpu"; `products`, torch's precision of fp32 matrix products;
    `measurements` and `failures`, results and errors by name. Raises ValueError for a recipe whose device is not
    available.
    """
    if recipe["device"] == "cuda" and not torch.cuda.is_available():
        raise ValueError("this scale needs a CUDA device, and torch sees none; --scale laptop rehearses it on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "part.json"
        start = time.perf_counter()
        ended = _run(recipe, out)
        taken = time.perf_counter() - start
        found = json.loads(out.read_text(encoding="utf-8")) if out.is_file() else {"measurements": {}, "failures": {}}
    failures = {**found["failures"], **({"the part itself": ended} if ended else {})}
    wrong = [name for name, one in found["measurements"].items() if one.get("equal") == 0 or one.get("failed")]
    return {
        "seconds": taken,
        "limit": recipe["limit"],
        "measured": len(found["measurements"]),
        "failed": len(failures),
        "wrong": len(wrong),
        "device": torch.cuda.get_device_name() if recipe["device"] == "cuda" else "cpu",
        "products": torch.get_float32_matmul_precision(),  # of fp32: "highest" is fp32 itself, without TF32
        "measurements": found["measurements"],
        "failures": failures,
    }


def _run(recipe: RecipeDict, out: Path) -> str:
    """Run the part until it ends or reaches its time limit; return "" if it ended well, else what ended it.

    recipe: an entry of `parts.arms` with a key "seed". out: the file into which the part writes its measurements.
    """
    environment = dict(os.environ)
    if recipe["device"] == "cpu":  # a rehearsal: kernels are interpreted
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "skipstone_studies.speed.gpu.child", recipe["part"], str(out)]
    with tempfile.TemporaryFile("w+", encoding="utf-8") as errors:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            text=True,
            env=environment,
            start_new_session=True,  # compilers that it has started end with it
        )
        try:
            process.communicate(json.dumps(recipe), timeout=recipe["limit"])
        except subprocess.TimeoutExpired:
            return f"stopped at its limit of {recipe['limit']:g} s"
        finally:
            _end(process)
        errors.seek(0)
        return "" if process.returncode == 0 else _last_words(process.returncode, errors.read())


def _end(process: subprocess.Popen[str]) -> None:
    """End the process and everything that it started."""
    for asked in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, asked)
        except ProcessLookupError:
            return
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _last_words(code: int, errors: str) -> str:
    """Return the exit code of a process and the error that ended it, without what libraries print at its exit.

    errors: its error output.
    """
    lines = [line.strip() for line in errors.splitlines() if line.strip()]
    raised = [line for line in lines if RAISED.match(line)]
    return f"ended with code {code}: {(raised or lines or ['no message'])[-1]}"[:LAST_WORDS]
