"""Code shared by the tests of single tools."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM

# Decisions that differ between a pass with sight of the row and a causal one.
MECHANISMS: list[dict[str, Any]] = [
    {"name": "mixture_of_depths", "layers": ":", "capacity": 0.5, "decision": "predictor"},
    {"name": "token_selective", "layers": "1:"},
    {"name": "early_exit", "layers": "2:"},
]

# Tools warn of themselves (names that they or transformers will give up); what ours say is tested elsewhere.
TOOLS_OWN_WARNINGS = "ignore"


def stirred(config: SkipstoneConfig) -> SkipstoneForCausalLM:
    """Return a model whose random weights are large enough that decisions differ from token to token."""
    torch.manual_seed(1)
    model = SkipstoneForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 or "bias" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def load(folder: str | Path, **options: Any) -> SkipstoneForCausalLM:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, **options)
    assert isinstance(model, SkipstoneForCausalLM)
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """Return the model's logits for two fixed rows, with decisions that look at no later token."""
    return model.eval()(input_ids=torch.arange(48).view(2, 24) % 200).logits


def shell(command: Sequence[str], folder: Path, seconds: int = 240) -> str:
    """Run a command of this environment in `folder` and return its standard output.

    The test fails with all output if the command fails. seconds: its time limit.
    """
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run(
        [str(program), *command[1:]],
        cwd=folder,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def environment() -> dict[str, str]:
    """Return this process's environment variables for a child that is to find the same packages."""
    import skipstone

    return {**os.environ, "PYTHONPATH": str(Path(skipstone.__file__).parents[1])}
