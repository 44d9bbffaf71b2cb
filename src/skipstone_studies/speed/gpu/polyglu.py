"""PolyGLU's MLP beside a SwiGLU of the same matrices, with 4,096 neurons in bf16: time and memory of training."""

from __future__ import annotations

import torch
from torch import nn

from skipstone import ops
from skipstone.core.strict import PlainDict
from skipstone.core.tokens import PassMode, Tokens
from skipstone.ops import reference
from skipstone_studies.speed.gpu.bench import Bench, in_turns
from skipstone_studies.speed.polyglu_cost import mlps, saved_bytes, step

ROUTED, PLAIN = "PolyGLU", "SwiGLU"


def measure(bench: Bench) -> None:
    """Time a PolyGLU and a SwiGLU MLP: eager, with the reference instead of the Triton kernels, and compiled."""
    bench.measure("eager, kernels of the device", beside)
    bench.measure("eager, reference", with_reference)
    bench.measure("compiled", beside, True)


def with_reference(bench: Bench) -> PlainDict:
    """Return what `beside` does, with the reference implementation of PolyGLU's mixture instead of the Triton kernels.

    Devices without these kernels use it.
    """
    chosen = ops._eager
    ops._eager = lambda device: reference  # type: ignore[assignment]
    try:
        return beside(bench)
    finally:
        ops._eager = chosen


def beside(bench: Bench, compiled: bool = False) -> PlainDict:
    """Return times of forward and backward pass of both MLPs, in turns, and the ratio of their saved bytes.

    compiled: compile both MLPs. Saved bytes are those kept for the backward pass.
    """
    torch.manual_seed(0)
    sizes = bench.sizes
    rows, length = sizes["rows"], sizes["context"]
    x_BTD = torch.randn(rows, length, sizes["width"]).to(bench.device).requires_grad_()
    slot = torch.arange(length, device=bench.device)[None]
    tokens = Tokens(slot_BT=slot, position_BT=slot, mode=PassMode(noise=True))
    pair: dict[str, nn.Module] = {
        name: mlp.to(bench.device) for name, mlp in zip((ROUTED, PLAIN), mlps(sizes["width"]), strict=True)
    }
    saved = {name: saved_bytes(mlp, x_BTD, tokens, True) for name, mlp in pair.items()}  # type: ignore[arg-type]
    for mlp in pair.values() if compiled else ():
        mlp.compile(backend=sizes["backend"])
    runs = {name: step(mlp, x_BTD, tokens, True) for name, mlp in pair.items()}  # type: ignore[arg-type]
    taken = in_turns(bench, runs, sizes["rounds"])
    return {
        "swiglu_ms": taken[PLAIN]["ms"],
        "polyglu_ms": taken[ROUTED]["ms"],
        "time": taken[ROUTED]["ms"] / taken[PLAIN]["ms"],
        "saved": saved[ROUTED] / saved[PLAIN],
        **bench.peak(),
    }
