"""The Triton kernels of PolyGLU's mixture, in a process of their own (see `fused_kernels.py`)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
CASES = Path(__file__).with_name("fused_kernels.py")


@pytest.mark.slow
def test_kernels_equal_the_reference() -> None:
    interpreted = {} if torch.cuda.is_available() else {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES)]
    ran = subprocess.run(command, env={**os.environ, **interpreted}, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout[-3000:]
    assert "passed" in ran.stdout
