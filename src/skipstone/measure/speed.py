"""Tokens per second of prefill and decoding, joules, and the bytes of the cache.

Models are timed in turns, so that changes in the machine's speed affect all of them. Passes use a cache and make
decisions that look at no later token; tokens are chosen greedily. Shape letters: B rows, P tokens of the prompt, N new
tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from skipstone.core.cache import SkipstoneCacheLayer
from skipstone.core.progress_bar import advance, work
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.wrapped import require_ours

NOT_MEASURABLE = "not measurable here"
POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One timed run of a task.

    tokens: number of tokens computed. seconds: elapsed time. joules: energy used; None without an energy meter.
    """

    tokens: int
    seconds: float
    joules: float | None


@dataclass(frozen=True, kw_only=True)
class Rate:
    """The timed runs (laps) of one model at one task, in the order in which they were measured."""

    laps: tuple[Lap, ...]

    @property
    def each(self) -> list[float]:
        """The tokens per second of each timed run."""
        return [lap.tokens / lap.seconds for lap in self.laps]

    @property
    def tokens_per_second(self) -> float:
        """The median over timed runs of the tokens per second."""
        return statistics.median(self.each)

    @property
    def spread(self) -> float:
        """Half of the range of tokens per second over timed runs, divided by their median."""
        return (max(self.each) - min(self.each)) / 2 / self.tokens_per_second

    @property
    def joules_per_token(self) -> float | None:
        """The joules per token over all timed runs (energy counters are coarse); None without an energy meter."""
        joules = [lap.joules for lap in self.laps if lap.joules is not None]
        return sum(joules) / sum(lap.tokens for lap in self.laps) if len(joules) == len(self.laps) else None


PREFILLS = 4  # in one lap: a single one is too short to be timed well
Task = Callable[[], Lap]
K = TypeVar("K", bound=Hashable)


def take_turns(tasks: Mapping[K, Task], rounds: int) -> dict[K, Rate]:
    """Time every task once per round, in alternating order, so that changes in the machine's speed affect all alike.

    tasks: by name, functions without arguments that run the task once, timed, and return the `Lap`. rounds: number of
    timed runs of each task in the result; one more round runs first to warm up and is discarded. Returns the timed runs
    of each task, by name.
    """
    names = list(tasks)
    laps: dict[K, list[Lap]] = {name: [] for name in names}
    with work(len(tasks) * (rounds + 1), "timings", alive=False):
        for turn in range(rounds + 1):
            for name in names if turn % 2 else names[::-1]:
                lap = tasks[name]()
                if turn:
                    laps[name].append(lap)
                advance("timings", note=f"{lap.tokens / lap.seconds:,.0f} tokens/s")
    return {name: Rate(laps=tuple(found)) for name, found in laps.items()}


def prefill_task(model: SkipstoneForCausalLM, ids_BP: Tensor) -> Task:
    """Return a function without arguments that times 4 prefills of a prompt, each up to the first new token.

    Each call returns a `Lap` that counts the prompt tokens of all rows and all 4 prefills. ids_BP: token ids of the
    prompts, int64 [B, P] (rows, prompt tokens), on the model's device.
    """
    meter = find_meter(model.device)

    def lap() -> Lap:
        stop = _start(model.device, meter)
        for _ in range(PREFILLS):
            prefill(model, ids_BP)
        return stop(ids_BP.numel() * PREFILLS)

    return lap


def decode_task(model: SkipstoneForCausalLM, ids_BP: Tensor, new_tokens: int) -> Task:
    """Return a function without arguments that times greedy decoding after a prompt; the prefill is not timed.

    Each call returns a `Lap` that counts the new tokens of all rows. ids_BP: token ids of the prompts, int64 [B, P]
    (rows, prompt tokens), on the model's device. new_tokens: number of steps, each of which computes one token of every
    row.
    """
    meter = find_meter(model.device)

    def lap() -> Lap:
        token_B1, cache = prefill(model, ids_BP)
        stop = _start(model.device, meter)
        _decode(model, token_B1, cache, new_tokens)
        return stop(token_B1.numel() * new_tokens)

    return lap


@torch.no_grad()
def prefill(model: SkipstoneForCausalLM, ids_BP: Tensor) -> tuple[Tensor, Cache]:
    """Run a prompt with a cache and return the first new token, greedily chosen, int64 [B, 1], and the cache.

    ids_BP: token ids, int64 [B, P] (rows, prompt tokens). The cache holds the P prompt tokens. Decisions look at no
    later token; noise is off. Raises ValueError for a model that is not a Skipstone model.
    """
    require_ours(model)
    out = model(ids_BP, use_cache=True, routing="causal", noise=False, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


@torch.no_grad()
def _decode(model: SkipstoneForCausalLM, token_B1: Tensor, cache: Cache, new_tokens: int) -> None:
    for _ in range(new_tokens):
        out = model(token_B1, past_key_values=cache, use_cache=True, routing="causal", noise=False, logits_to_keep=1)
        token_B1 = out.logits[:, -1:].argmax(-1)


def _start(device: torch.device, meter: EnergyMeter | None) -> Callable[[int], Lap]:
    """Start the clock and the energy meter, and return a function that stops them.

    It takes the number of tokens that were computed, and returns the lap. device: is awaited at both ends.
    """
    finish(device)
    joules, seconds = meter.read() if meter else None, time.perf_counter()

    def stop(tokens: int) -> Lap:
        finish(device)
        spent = time.perf_counter() - seconds
        return Lap(
            tokens=tokens,
            seconds=spent,
            joules=None if meter is None or joules is None else meter.read() - joules,
        )

    return stop


def finish(device: torch.device) -> None:
    """Wait until a CUDA device has finished all its work; return at once on other devices."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@dataclass(frozen=True, kw_only=True)
class CacheBytes:
    """The bytes of a cache over all layers, divided by the number of tokens that the model has seen.

    Tokens that blocks skipped count as seen. kv: bytes of keys, values and slots (indices in the row) of the stored
    tokens. state: bytes of what mechanisms store, with the slots of the entries. allocated: bytes that the cache has
    reserved, used or not.
    """

    kv: float
    state: float
    allocated: float


def cache_bytes(model: SkipstoneForCausalLM, ids_BT: Tensor) -> CacheBytes:
    """Prefill a cache with `ids_BT`, with decisions that look at no later token, and return its bytes per token.

    ids_BT: token ids, int64 [B, T] (rows, tokens), on the model's device. Raises ValueError for a model that is not a
    Skipstone model.
    """
    _, cache = prefill(model, ids_BT)
    kv = state = allocated = 0
    for layer in cache.layers:
        assert isinstance(layer, SkipstoneCacheLayer)
        kv += layer.kv.bytes()
        state += sum(store.bytes() for store in layer.stores.values())
        allocated += sum(store.bytes(allocated=True) for store in (layer.kv, *layer.stores.values()))
    seen = ids_BT.numel()
    return CacheBytes(kv=kv / seen, state=state / seen, allocated=allocated / seen)


@dataclass(frozen=True, kw_only=True)
class EnergyMeter:
    """A counter of energy.

    source: "RAPL" (CPU packages) or "NVML" (an NVIDIA GPU). read: returns the joules since some fixed moment, never
    decreasing.
    """

    source: str
    read: Callable[[], float]


def find_meter(device: torch.device, powercap: Path = POWERCAP) -> EnergyMeter | None:
    """Return the energy meter of the machine that computes on `device`; None if there is none that this user may read.

    For a CUDA device it is the GPU's own counter (NVML), for any other RAPL. powercap: folder of the RAPL counters.
    """
    return _nvml(device) if device.type == "cuda" else _rapl(powercap)


def _rapl(powercap: Path) -> EnergyMeter | None:
    """Return an energy meter of all CPU packages of the machine; None if their counters cannot be read.

    powercap: folder of the RAPL counters. Domains inside a package (such as intel-rapl:0:1) are left out, because the
    package includes them.
    """
    packages = [folder for folder in sorted(powercap.glob("*-rapl:*")) if folder.name.count(":") == 1]
    try:
        counters = [_Wrapping(folder) for folder in packages]
    except (OSError, ValueError):  # readable by root alone on many machines
        return None
    return EnergyMeter(source="RAPL", read=lambda: sum(counter() for counter in counters)) if counters else None


class _Wrapping:
    """A function that returns the joules counted by one RAPL domain, whose own counter starts at 0 after its range.

    folder: the domain's folder below powercap.
    """

    def __init__(self, folder: Path) -> None:
        self._file = folder / "energy_uj"
        self._range = int((folder / "max_energy_range_uj").read_text())
        self._last, self._total = self._now(), 0

    def __call__(self) -> float:
        now = self._now()
        self._total += (now - self._last) % self._range
        self._last = now
        return self._total / 1e6

    def _now(self) -> int:
        return int(self._file.read_text())


def _nvml(device: torch.device) -> EnergyMeter | None:
    try:
        import pynvml  # type: ignore[import-not-found]
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        uuid = str(torch.cuda.get_device_properties(device).uuid)
        handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith("GPU-") else f"GPU-{uuid}")
        pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except pynvml.NVMLError:
        return None
    return EnergyMeter(source="NVML", read=lambda: pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3)
