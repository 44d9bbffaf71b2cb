"""Part of the GPU study: time and memory of training PolyGLU's MLP and a SwiGLU with the same matrices, in bf16."""

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
    """Time a PolyGLU and a SwiGLU MLP: with the device's kernels, with the reference implementation, and compiled.

    bench: gives the device and the sizes, and stores for each of the three ways milliseconds, their ratio, and the
    ratio of the bytes kept for the backward pass.
    """
    bench.measure("eager, kernels of the device", beside)
    bench.measure("eager, reference", with_reference)
    bench.measure("compiled", beside, True)


def with_reference(bench: Bench) -> PlainDict:
    """Time forward and backward of a SwiGLU MLP, and of a PolyGLU MLP with the reference implementation of its mixture.

    The reference takes the place of the device's kernels, and nothing is compiled. bench: gives the device and the
    sizes. Keys of the result: `swiglu_ms`, `polyglu_ms`, `time` (polyglu_ms / swiglu_ms), `saved` (bytes kept for the
    backward pass, PolyGLU's divided by SwiGLU's), and on a GPU `peak_gb` (peak memory in GB).
    """
    chosen = ops._eager
    ops._eager = lambda device: reference  # type: ignore[assignment]
    try:
        return beside(bench)
    finally:
        ops._eager = chosen


def beside(bench: Bench, compiled: bool = False) -> PlainDict:
    """Time forward and backward pass of a PolyGLU and a SwiGLU MLP of equal sizes in bf16, in turns.

    bench: gives the device and the sizes. compiled: whether to compile both. Keys of the result: `swiglu_ms`,
    `polyglu_ms`, `time` (polyglu_ms / swiglu_ms), `saved` (bytes kept for the backward pass, PolyGLU's divided by
    SwiGLU's), and on a GPU `peak_gb` (peak memory in GB).
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
