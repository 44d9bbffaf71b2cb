"""Floor 0: tensor functions without parameters. `reference` is the specification; fast backends stand beside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from skipstone.ops import fusible, grouped, lean, reference


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """`reference.mix_activations` by what suits the device: a compiler, the CPU, or neither."""
    eager = lean if gate_BTF.device.type == "cpu" else reference
    chosen = fusible if torch.compiler.is_compiling() else eager
    return chosen.mix_activations(gate_BTF, static_BFA, dynamic_BTA, temperature)


def apply_experts(*args: Any) -> Tensor:
    """`reference.apply_experts`; compiled, the plain one: PyTorch 2.13 compiles grouped products in bf16 only."""
    return (reference if torch.compiler.is_compiling() else grouped).apply_experts(*args)
