"""Tokens per second of prefill and decoding, taken in turns by all models, so that none has the machine's good minute.

Routing is causal with a cache, greedy. Shape letters: B rows, P tokens of the prompt, N new tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from skipstone.measure.energy import EnergyMeter, find_meter
from skipstone.model.causal_lm import SkipstoneForCausalLM


@dataclass(frozen=True, kw_only=True)
class Lap:
    """One timing: tokens done, seconds, and joules where there is a meter."""

    tokens: int
    seconds: float
    joules: float | None


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Laps of one model at one task."""

    laps: tuple[Lap, ...]

    @property
    def each(self) -> list[float]:
        return [lap.tokens / lap.seconds for lap in self.laps]

    @property
    def tokens_per_second(self) -> float:
        """The median."""
        return statistics.median(self.each)

    @property
    def spread(self) -> float:
        """Half of the range, as a share of the median."""
        return (max(self.each) - min(self.each)) / 2 / self.tokens_per_second

    @property
    def joules_per_token(self) -> float | None:
        """Over all laps together: the counters are coarse."""
        joules = [lap.joules for lap in self.laps if lap.joules is not None]
        return sum(joules) / sum(lap.tokens for lap in self.laps) if len(joules) == len(self.laps) else None


PREFILLS = 4  # in one lap: a single one is too short to be timed well
Task = Callable[[], Lap]
K = TypeVar("K", bound=Hashable)


def take_turns(tasks: Mapping[K, Task], rounds: int) -> dict[K, Rate]:
    """Every task once a round, in alternating order; a first round, which pays for warming up, is thrown away."""
    names = list(tasks)
    laps: dict[K, list[Lap]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else names[::-1]:
            lap = tasks[name]()
            if turn:
                laps[name].append(lap)
    return {name: Rate(laps=tuple(found)) for name, found in laps.items()}


def prefill_task(model: SkipstoneForCausalLM, ids_BP: Tensor) -> Task:
    """The prompt alone, up to the first new token, a few times in a row."""
    meter = find_meter(model.device)

    def lap() -> Lap:
        stop = _start(model.device, meter)
        for _ in range(PREFILLS):
            prefill(model, ids_BP)
        return stop(ids_BP.numel() * PREFILLS)

    return lap


def decode_task(model: SkipstoneForCausalLM, ids_BP: Tensor, new_tokens: int) -> Task:
    """`new_tokens` passes of one token a row after the prompt, which is not timed."""
    meter = find_meter(model.device)

    def lap() -> Lap:
        token_B1, cache = prefill(model, ids_BP)
        stop = _start(model.device, meter)
        _decode(model, token_B1, cache, new_tokens)
        return stop(token_B1.numel() * new_tokens)

    return lap


@torch.no_grad()
def prefill(model: SkipstoneForCausalLM, ids_BP: Tensor) -> tuple[Tensor, Cache]:
    """The first new token [B, 1], and the cache."""
    out = model(ids_BP, use_cache=True, routing="causal", noise=False, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


@torch.no_grad()
def _decode(model: SkipstoneForCausalLM, token_B1: Tensor, cache: Cache, new_tokens: int) -> None:
    for _ in range(new_tokens):
        out = model(token_B1, past_key_values=cache, use_cache=True, routing="causal", noise=False, logits_to_keep=1)
        token_B1 = out.logits[:, -1:].argmax(-1)


def _start(device: torch.device, meter: EnergyMeter | None) -> Callable[[int], Lap]:
    """Start clock and meter; the result stops them."""
    _finish(device)
    joules, seconds = meter.read() if meter else None, time.perf_counter()

    def stop(tokens: int) -> Lap:
        _finish(device)
        spent = time.perf_counter() - seconds
        return Lap(
            tokens=tokens,
            seconds=spent,
            joules=None if meter is None or joules is None else meter.read() - joules,
        )

    return stop


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
