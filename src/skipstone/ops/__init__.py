"""Floor 0: tensor functions without parameters. `reference` is the specification; fast backends stand beside it."""

from __future__ import annotations

import torch
from torch import Tensor

from skipstone.ops import lean, reference


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """`reference.mix_activations` by the backend that suits the device; a compiler fuses the plain one by itself."""
    chunked = gate_BTF.device.type == "cpu" and not torch.compiler.is_compiling()
    return (lean if chunked else reference).mix_activations(gate_BTF, static_BFA, dynamic_BTA, temperature)
