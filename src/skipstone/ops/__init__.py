"""Floor 0: tensor functions without parameters. `reference` specifies them; faster backends must equal it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from skipstone.ops import compile_friendly, cpu, grouped, reference
from skipstone.ops import score_linear as memory_saving


def mix_activations(gate_BTF: Tensor, static_BFA: Tensor, dynamic_BTA: Tensor, temperature: Tensor | float) -> Tensor:
    """Compute `reference.mix_activations` by the backend that suits the device: Triton on CUDA, a chunked form on a
    CPU.

    In compiled code, an expression that compilers fuse well; on other devices, the reference itself.
    """
    chosen = compile_friendly if torch.compiler.is_compiling() else _eager(gate_BTF.device.type)
    return chosen.mix_activations(gate_BTF, static_BFA, dynamic_BTA, temperature)  # type: ignore[no-any-return]


@cache
def _eager(device: str) -> ModuleType:
    """Return the backend for uncompiled code on this type of device."""
    if device == "cuda" and find_spec("triton") is not None:  # PyTorch for CUDA installs it on Linux
        return import_module("skipstone.ops.fused")
    return cpu if device == "cpu" else reference


def apply_experts(*args: Any) -> Tensor:
    """Compute `reference.apply_experts` by grouped matrix products; compiled or in fp64, by the reference.

    PyTorch 2.13 compiles grouped products in bf16 only and has none in fp64.
    """
    plain = torch.compiler.is_compiling() or args[0].dtype == torch.float64
    return (reference if plain else grouped).apply_experts(*args)


def score_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: bool = False) -> Tensor:
    """Compute `reference.score_linear`; uncompiled, in a form that keeps less for the backward pass."""
    return (reference if torch.compiler.is_compiling() else memory_saving).score_linear(x, weight, bias, norm)
