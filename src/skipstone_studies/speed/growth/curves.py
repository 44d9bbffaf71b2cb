"""Cost curves: CPU seconds and peak memory of a pass as one size of a model or of its input grows."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict
from skipstone_studies.study import Figures, RecipeDict

MODELS: dict[str, PlainDict] = {
    "dense": {},
    "mixture_of_depths": {"mechanisms": [{"name": "mixture_of_depths", "layers": "1::2", "decision": "topk"}]},
    "token_selective": {"mechanisms": [{"name": "token_selective", "layers": "1:"}]},
    "early_exit": {"mechanisms": [{"name": "early_exit", "layers": "1:"}]},
    "gate_skip": {"mechanisms": [{"name": "gate_skip", "layers": "1:"}]},
    "polyglu": {"activation": {"name": "polyglu"}},
}
SIZE: PlainDict = {"width": 64, "blocks": 2, "rows": 1, "context": 256, "vocabulary": 256, "repeats": 3}
AXES: dict[str, tuple[int, ...]] = {
    "context": (256, 512, 1024, 2048, 4096, 8192),
    "rows": (1, 2, 4, 8, 16, 32, 64),
    "blocks": (2, 4, 8, 16, 32, 64),
    "vocabulary": (256, 1024, 4096, 16384, 65536),
}
LAST = 3  # points of a curve from which its exponent is fitted
M_MMAP_THRESHOLD, LARGE = -3, 1 << 16  # glibc then returns every freed block of this many bytes to the system


def measured(recipe: RecipeDict) -> Figures:
    """Measure one curve of forward passes: time and memory as one size of the model or its input grows.

    Returns, besides its points: `exponents` of CPU seconds, FLOPs by the cost model, peak memory and bytes of the
    largest tensors, fitted to the last three points; `apart`, differences of these exponents; `rate`, GFLOP/s at the
    first and last point. The exponents of time and FLOPs differ by the exponent of this rate.
    """
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
    return with_exponents([_point({**recipe, recipe["axis"]: value}, value) for value in recipe["values"]])


def with_exponents(points: list[dict[str, float]]) -> Figures:
    """Return the figures of a curve (see `measured`) from its points, which are in order of size."""
    ends = points[-LAST:]
    sizes = [point["size"] for point in ends]
    exponents = {key: exponent(sizes, [point[key] for point in ends]) for key in ("seconds", "flops", "peak", "bytes")}
    rates = [point["flops"] / point["seconds"] / 1e9 for point in points]
    return {
        "points": points,
        "exponents": exponents,
        "apart": {
            "time": exponents["seconds"] - exponents["flops"],
            "memory": exponents["peak"] - exponents["bytes"],
        },
        "rate": {"first": rates[0], "last": rates[-1], "exponent": exponent(sizes, rates[-LAST:])},
        "seconds": points[-1]["seconds"],
        "peak_mb": points[-1]["peak"] / 1e6,
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of log values over log sizes."""
    x, y = ([math.log(one) for one in several] for several in (sizes, values))
    return statistics.linear_regression(x, y).slope


def _point(recipe: RecipeDict, size: int) -> dict[str, float]:
    """Measure one point: CPU seconds (the least of some passes), peak bytes of a pass, and what arithmetic expects."""
    model = model_of(recipe)
    ids = torch.randint(0, recipe["vocabulary"], (recipe["rows"], recipe["context"]))
    tokens = recipe["rows"] * recipe["context"]
    widest = max(
        2 * recipe["width"] + 3 * int(model.config.intermediate_size or 0), 2 * recipe["width"] + recipe["vocabulary"]
    )

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=False, routing="oracle", noise=False)

    run()
    return {
        "size": float(size),
        "seconds": min(cpu_seconds(run) for _ in range(recipe["repeats"])),
        "flops": model.cost(tokens=recipe["context"], batch=recipe["rows"], routing="oracle").forward.total,
        "peak": peak_bytes(run),
        "bytes": 4.0 * tokens * widest,  # the stream and what a block's MLP or the head adds to it, in fp32
    }


def model_of(recipe: RecipeDict) -> SkipstoneForCausalLM:
    """Build the model of one point of a curve with random weights."""
    torch.manual_seed(recipe["seed"])
    config = SkipstoneConfig(
        vocab_size=recipe["vocabulary"],
        hidden_size=recipe["width"],
        num_hidden_layers=recipe["blocks"],
        num_attention_heads=max(1, recipe["width"] // 64),
        max_position_embeddings=recipe["context"],
        **MODELS[recipe["model"]],
    )
    return SkipstoneForCausalLM(config).eval()


def cpu_seconds(run: Callable[[], object]) -> float:
    """Return the CPU seconds of calling `run`, which other processes disturb less than wall time."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak_bytes(run: Callable[[], object]) -> float:
    """Return by how many bytes calling `run` raises the peak resident memory of this process (Linux only)."""
    gc.collect()
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the peak anew
    before = resident("VmRSS")
    run()
    return float(max(resident("VmHWM") - before, 1))


def resident(name: str) -> int:
    """Return a size in bytes from this process's status file; name: such as VmRSS or VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{name}:"))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library("c") or None)


def arms(values: Mapping[str, Sequence[int]] = AXES) -> dict[str, RecipeDict]:
    """Return the curves, one for each axis and model; values: the sizes by axis."""
    return {
        f"{axis}, {model}": {**SIZE, "kind": "curve", "axis": axis, "values": list(found), "model": model}
        for axis, found in values.items()
        for model in MODELS
    }
