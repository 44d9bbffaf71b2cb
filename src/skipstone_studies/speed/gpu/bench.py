"""`Bench`, by which a part of the GPU study takes and stores measurements and goes on after one that fails.

Also functions that time calls on the device, and that compare tensors.
"""

from __future__ import annotations

import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from skipstone.core.atomic_write import write_whole
from skipstone.core.strict import PlainDict, PlainMapping

LONGEST = 300  # characters of an error that are kept
WARM_UP = 3  # untimed steps: the first allocates or compiles
RIGHT, WRONG = 1, 0


@dataclass(kw_only=True)
class Bench:
    """The measurements of one part of the GPU study, written to a file after each of them.

    out: the file. device: where the part computes. sizes: the part's recipe, with the sizes of its models. found: the
    result of each measurement by name. failures: the error of each failed measurement by name; the part goes on with
    the next one.
    """

    out: Path
    device: torch.device
    sizes: PlainMapping
    found: PlainDict = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def measure(self, name: str, run: Callable[..., PlainMapping], *given: object) -> None:
        """Take a measurement and write its result, or its error, to the file under `name`.

        run: a function that is called with this bench and the arguments `given`; it returns figures by name, such as
        milliseconds.
        """
        try:
            self.found[name] = dict(run(self, *given))
        except Exception as error:  # whatever a driver, compiler or kernel raises: the page says it
            self.failures[name] = one_line(error)
        self.write()
        self.release()

    def write(self) -> None:
        """Write everything that was measured so far to the file `out`."""
        write_whole(self.out, json.dumps({"measurements": self.found, "failures": self.failures}))

    def release(self) -> None:
        """Free what a measurement has left (compiled code, tensors, cached memory), and reset the GPU's peak memory."""
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()
        gc.collect()
        if self.on_gpu:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    @property
    def on_gpu(self) -> bool:
        """Whether measurements run on a CUDA device."""
        return self.device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device has finished all work."""
        if self.on_gpu:
            torch.cuda.synchronize()

    def bf16(self) -> AbstractContextManager[object]:
        """Return a context in which matrix products are computed in bf16, with fp32 weights (autocast)."""
        return torch.autocast(self.device.type, torch.bfloat16)

    def peak(self) -> PlainDict:
        """Return {"peak_gb": the GPU's peak memory in GB since `release` was last called}; empty on a CPU."""
        return {"peak_gb": torch.cuda.max_memory_allocated() / 1e9} if self.on_gpu else {}


def one_line(error: BaseException) -> str:
    """Return an error as one line of at most 300 characters, with its class."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:LONGEST] if text else type(error).__name__


def in_turns(bench: Bench, runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Time several functions in turns, after three untimed calls of each, and return their milliseconds per call.

    The result is {name: {"ms": median over calls, "least": ..., "most": ...}}. bench: knows the device. runs: the
    functions by name. rounds: number of timed calls of each. The device is awaited before and after each call, so a
    time includes launching the kernels.
    """
    for run in runs.values():
        for _ in range(WARM_UP):
            run()
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name in list(runs) if turn % 2 else list(runs)[::-1]:
            bench.wait()
            start = time.perf_counter()
            runs[name]()
            bench.wait()
            taken[name].append((time.perf_counter() - start) * 1e3)
    return {name: {"ms": statistics.median(t), "least": min(t), "most": max(t)} for name, t in taken.items()}


def captured(bench: Bench, run: Callable[[], object]) -> Callable[[], object]:
    """Return a function that replays `run` as one CUDA graph, or `run` itself if `bench` is not on a CUDA device.

    Raises RuntimeError if `run` makes the host wait for the device or copies from host memory, which a graph cannot
    contain.
    """
    for _ in range(WARM_UP):
        run()
    if not bench.on_gpu:
        return run
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def scaled_error(got: Tensor, wanted: Tensor) -> float:
    """Return max |got - wanted| / max(1, max |wanted|): relative for large values, absolute for small ones."""
    scale = max(1.0, wanted.float().abs().max().item()) if wanted.numel() else 1.0
    return (got.float() - wanted.float()).abs().max().item() / scale if wanted.numel() else 0.0


def compared(pairs: Mapping[str, tuple[Tensor, Tensor]], tolerance: float) -> PlainDict:
    """Compare pairs of tensors and return their errors, each max |got - wanted| / max(1, max |wanted|).

    pairs: the tensors (got, wanted) by name. tolerance: the largest error that counts as agreement. Keys of the result:
    `error` (the largest), `tolerance`, `equal` (1 if no error exceeds the tolerance, else 0) and `of` (all errors, as
    text).
    """
    errors = {name: scaled_error(*pair) for name, pair in pairs.items()}
    worst = max(errors.values())
    return {
        "error": worst,
        "tolerance": tolerance,
        "equal": RIGHT if worst <= tolerance else WRONG,  # NaN is not
        "of": "; ".join(f"{name} {error:.1e}" for name, error in errors.items()),
    }
