"""Part of the study of growth: CPU seconds and peak memory of a pass as one size of model or input grows."""

from __future__ import annotations

import ctypes
import ctypes.util
import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict
from skipstone_studies.speed.resident import resident_bytes, resident_peak
from skipstone_studies.study import Figures, RecipeDict

MODELS: dict[str, PlainDict] = {
    "dense": {},
    "mixture_of_depths": {"mechanisms": [{"name": "mixture_of_depths", "layers": "1::2", "decision": "topk"}]},
    "token_selective": {"mechanisms": [{"name": "token_selective", "layers": "1:"}]},
    "early_exit": {"mechanisms": [{"name": "early_exit", "layers": "1:"}]},
    "gate_skip": {"mechanisms": [{"name": "gate_skip", "layers": "1:"}]},
    "polyglu": {"activation": {"name": "polyglu"}},
}
SIZE: PlainDict = {"width": 64, "blocks": 2, "rows": 8, "context": 256, "vocabulary": 256, "repeats": 3}
# By context, products of width 256: narrow ones reach a third of the rate of attention, whose share of the work grows.
# By vocabulary, the last three points have logits of 34 to 537 MB: none of them fits into a processor's cache.
SIZES: dict[str, PlainDict] = {"context": {"rows": 1, "width": 256}, "rows": {"rows": 1}, "vocabulary": {"rows": 2}}
AXES: dict[str, tuple[int, ...]] = {
    "context": (256, 512, 1024, 2048, 4096, 8192),
    "rows": (1, 2, 4, 8, 16, 32, 64),
    "blocks": (2, 4, 8, 16, 32, 64),
    "vocabulary": (1024, 4096, 16384, 65536, 262144),
}
LAST = 3  # points of a curve from which its exponent is fitted
# glibc's options: from how many bytes on it gives free memory back to the system, and maps a block of its own. Memory
# that is given back costs page faults when it is used again, a fifth of a pass; memory that is kept hides the peak.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
KEPT, RETURNED = (1 << 30, 1 << 25), (1 << 17, 1 << 16)


def measured(recipe: RecipeDict) -> Figures:
    """Measure one cost curve: time and memory of a forward pass as one size of the model or its input grows.

    recipe: an entry of `arms` with a key "seed"; its "axis" names the size and "values" lists what it is set to. Keys
    of the result: `points`, one dict for each value; `exponents` with which time and memory grow; `apart`, these minus
    those of the FLOPs and bytes that are expected; `rate`, GFLOP/s of the `first` and `last` point and their
    `exponent`; `seconds` and `peak_mb` of the last point.
    """
    sizes = [(value, {**recipe, recipe["axis"]: value}) for value in recipe["values"]]
    expected = [_expected(one, value) for value, one in sizes]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:  # this one keeps memory of earlier curves
        peaks = list(fresh.map(_peak, [one for _, one in sizes]))
    seconds = [least_seconds(_pass(one), recipe["repeats"]) for _, one in sizes]
    told = zip(expected, peaks, seconds, strict=True)
    return with_exponents([{**point, "peak": peak, "seconds": taken} for point, peak, taken in told])


def with_exponents(points: list[dict[str, float]], largest: float = math.inf) -> Figures:
    """Return the figures of a cost curve: its points, and the exponents with which time and memory grow.

    points: in order of size, each with `size`, `seconds` (CPU), `flops` (without pairs of tokens that the causal mask
    hides), `peak` (bytes of peak memory) and `bytes` (of the largest tensors that a pass holds at once). largest: no
    exponent is fitted to points of a larger size. Keys of the result: `points`; `exponents`, by name those of all
    figures but the size, fitted to the last three points; `apart`, {"time": exponent of the seconds minus exponent of
    the FLOPs, "memory": exponent of the peak minus exponent of the bytes}; `rate`, the GFLOP/s of the `first` and the
    `last` point and their `exponent`; `seconds` and `peak_mb` of the last point.
    """
    ends = [point for point in points if point["size"] <= largest][-LAST:]
    sizes = [point["size"] for point in ends]
    exponents = {key: exponent(sizes, [point[key] for point in ends]) for key in ("seconds", "flops", "peak", "bytes")}
    rates = [point["flops"] / point["seconds"] / 1e9 for point in points]
    ending = [point["flops"] / point["seconds"] for point in ends]
    return {
        "points": points,
        "exponents": exponents,
        "apart": {
            "time": exponents["seconds"] - exponents["flops"],
            "memory": exponents["peak"] - exponents["bytes"],
        },
        "rate": {"first": rates[0], "last": rates[-1], "exponent": exponent(sizes, ending)},
        "seconds": points[-1]["seconds"],
        "peak_mb": points[-1]["peak"] / 1e6,
    }


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """Return the least-squares slope of log values over log sizes."""
    x, y = ([math.log(one) for one in several] for several in (sizes, values))
    return statistics.linear_regression(x, y).slope


def _expected(recipe: RecipeDict, size: int) -> dict[str, float]:
    """Return what the cost model expects of a point: `size`, `flops` and `bytes` of the largest tensors of a pass.

    recipe: that of the curve, set to this size.
    """
    model = model_of(recipe)
    tokens = recipe["rows"] * recipe["context"]
    widest = max(
        2 * recipe["width"] + 3 * int(model.config.intermediate_size or 0), 2 * recipe["width"] + recipe["vocabulary"]
    )
    return {
        "size": float(size),
        "flops": causal_flops(model, recipe["rows"], recipe["context"]),
        "bytes": 4.0 * tokens * widest,  # the stream and what a block's MLP or the head adds to it, in fp32
    }


def _peak(recipe: RecipeDict) -> float:
    torch.set_num_threads(1)
    return peak_bytes(_pass(recipe))


def _pass(recipe: RecipeDict) -> Callable[[], object]:
    model = model_of(recipe)
    ids = torch.randint(0, recipe["vocabulary"], (recipe["rows"], recipe["context"]))

    @torch.no_grad()
    def run() -> None:
        model(input_ids=ids, use_cache=False, routing="oracle", noise=False)

    return run


def causal_flops(model: SkipstoneForCausalLM, rows: int, context: int) -> float:
    """Return the FLOPs of a forward pass by the cost model, without the pairs of tokens that the causal mask hides.

    The cost model counts those pairs, but the attention kernel leaves them out. rows: number of rows. context: tokens
    of a row.
    """
    cost = model.cost(tokens=context, batch=rows, routing="oracle").forward
    return cost.total - cost.attention_score * (context - 1) / (2 * context)


def model_of(recipe: RecipeDict) -> SkipstoneForCausalLM:
    """Build a model with random weights for one point of a cost curve.

    recipe: has the keys "seed", "model" (a key of `MODELS`), "width", "blocks", "context" and "vocabulary".
    """
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


def least_seconds(run: Callable[[], object], repeats: int) -> float:
    """Return the least CPU seconds of `repeats` calls of `run`, after one call that is not timed.

    Other processes hardly disturb CPU time. From then on, this process keeps freed memory instead of returning it.
    """
    _free_memory_is(KEPT)
    run()
    taken = []
    for _ in range(repeats):
        start = time.process_time()
        run()
        taken.append(time.process_time() - start)
    return min(taken)


def peak_bytes(run: Callable[[], object]) -> float:
    """Return by how many bytes a second call of `run` raises the peak resident memory of this process (Linux only).

    It has to be called before `least_seconds`, which makes the process keep freed memory.
    """
    _free_memory_is(RETURNED)
    run()
    gc.collect()
    trim = getattr(_libc(), "malloc_trim", None)
    if trim is not None:
        trim(0)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # starts the peak anew
    before = resident_bytes()
    run()
    return float(max(resident_peak() - before, 1))


def _free_memory_is(thresholds: tuple[int, int]) -> None:
    mallopt = getattr(_libc(), "mallopt", None)
    if mallopt is not None:
        for option, size in zip((M_TRIM_THRESHOLD, M_MMAP_THRESHOLD), thresholds, strict=True):
            mallopt(option, size)


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(ctypes.util.find_library("c") or None)


def arms(values: Mapping[str, Sequence[int]] = AXES) -> dict[str, RecipeDict]:
    """Return the recipes of the cost curves (time and memory of a pass over one size), one for each axis and model.

    values: for each axis ("context", "rows", "blocks", "vocabulary") the sizes along it.
    """
    return {
        f"{axis}, {model}": {**SIZE, **SIZES.get(axis, {}), **curve, "values": list(found), "model": model}
        for axis, found in values.items()
        for curve in [{"kind": "curve", "axis": axis}]
        for model in MODELS
    }
