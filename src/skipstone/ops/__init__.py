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
    """Mix PolyGLU's activation functions as `reference.mix_activations` does, by the fastest backend for the device.

    gate_BTF: pre-activations of F neurons, [B, T, F] (rows, tokens, neurons). static_BFA: logits of each neuron for the
    A functions, [1 or B, F, A]. dynamic_BTA: logits of each token, [B, 1 or T, A], added to them. temperature:
    temperature of the softmax over the sum. Returns [B, T, F]. The backend is `ops/fused.py` on CUDA with Triton,
    `ops/cpu.py` on a CPU, `ops/compile_friendly.py` under torch.compile, and elsewhere the reference.
    """
    chosen = compile_friendly if torch.compiler.is_compiling() else _eager(gate_BTF.device.type)
    return chosen.mix_activations(gate_BTF, static_BFA, dynamic_BTA, temperature)  # type: ignore[no-any-return]


@cache
def _eager(device: str) -> ModuleType:
    """Return the backend module for uncompiled code on a type of device. device: the type, such as "cuda"."""
    if device == "cuda" and find_spec("triton") is not None:  # PyTorch for CUDA installs it on Linux
        return import_module("skipstone.ops.fused")
    return cpu if device == "cpu" else reference


def apply_experts(*args: Any) -> Tensor:
    """Compute `reference.apply_experts` (its arguments and result) by grouped matrix products.

    The reference itself is used under torch.compile and in fp64, because PyTorch 2.13 compiles grouped products in bf16
    only and has none in fp64. args: the reference's arguments, by position.
    """
    plain = torch.compiler.is_compiling() or args[0].dtype == torch.float64
    return (reference if plain else grouped).apply_experts(*args)


def score_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: bool = False) -> Tensor:
    """Compute a router's fp32 product as `reference.score_linear` does, saving less for the backward pass.

    x: [..., D] of any float dtype. weight: [O, D]. bias: [O] or None. norm: whether x is first divided by its root mean
    square. Returns [..., O]. Under torch.compile, the reference itself is used.
    """
    return (reference if torch.compiler.is_compiling() else memory_saving).score_linear(x, weight, bias, norm)
