"""The GPU study and CUDA graphs, rehearsed on a device that is not the CPU (see `gpu_on_pretend.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

CASES = Path(__file__).with_name("gpu_on_pretend.py")


@pytest.mark.slow
def test_nothing_mixes_devices() -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    ran = subprocess.run(
        command, cwd=CASES.parents[2], env=dict(os.environ), capture_output=True, text=True, check=False
    )
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "passed" in ran.stdout
