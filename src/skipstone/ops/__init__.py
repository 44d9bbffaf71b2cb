"""Functions on tensors; `reference` has the plain form of each, which the faster ones must equal.

None of the functions owns parameters. This package imports no other package of Skipstone (floor 0 in
docs/architecture.md).
"""

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
    """Mix A activation functions for each neuron and token (PolyGLU), by the fastest backend for the device.

    The result, [B, T, F], is sum_k softmax_k((static + dynamic) / temperature) act_k(gate), with act = ReLU, tanh,
    SiLU, GELU. gate_BTF: pre-activations of F neurons, [B, T, F] (rows, tokens, neurons). static_BFA: logits of each
    neuron, [1 or B, F, A]. dynamic_BTA: logits of each token, [B, 1 or T, A]. temperature: a positive number. The
    backend is `ops/fused.py` on CUDA with Triton, `ops/cpu.py` on a CPU, `ops/compile_friendly.py` under torch.compile,
    and elsewhere `ops/reference.py`.
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
    """Return the outputs of a mixture of SwiGLU experts for N tokens of width D, [N, D], by grouped matrix products.

    args, by position: the inputs x_ND; expert_NC, int64, the C experts that each token chose; weight_NC, the factors on
    these experts' outputs; idle_NC, bool, choices that add nothing, or None if there are none; gate_XFD, up_XFD and
    down_XDF, the weights of X experts of F neurons; and the activation function, which is applied to the gate
    projection. The plain form of `ops/reference.py` is used under torch.compile and in fp64, because PyTorch 2.13
    compiles grouped products in bf16 only and has none in fp64.
    """
    plain = torch.compiler.is_compiling() or args[0].dtype == torch.float64
    return (reference if plain else grouped).apply_experts(*args)


def score_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, norm: bool = False) -> Tensor:
    """Return a router's product x weight^T + bias in fp32, [..., O], saving no fp32 copy of x for the backward pass.

    x: [..., D] of any float dtype, D inputs. weight: [O, D], O outputs. bias: [O] or None. norm: whether x is first
    divided by its root mean square. Under torch.compile, the plain form of `ops/reference.py` is used.
    """
    return (reference if torch.compiler.is_compiling() else memory_saving).score_linear(x, weight, bias, norm)
