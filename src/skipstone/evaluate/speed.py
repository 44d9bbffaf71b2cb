"""Tokens per second of prefill and decoding, taken in turns by all models, so that none has the machine's good minute.

Routing is causal with a cache, greedy. Shape letters: B rows, P tokens of the prompt, N new tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from skipstone.evaluate.energy import Meter, find_meter
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


Task = Callable[[], Lap]


def take_turns(tasks: Mapping[str, Task], rounds: int) -> dict[str, Rate]:
    """Every task once a round, in alternating order; a first round, which pays for warming up, is thrown away."""
    names = list(tasks)
    laps: dict[str, list[Lap]] = {name: [] for name in names}
    for turn in range(rounds + 1):
        for name in names if turn % 2 else names[::-1]:
            lap = tasks[name]()
            if turn:
                laps[name].append(lap)
    return {name: Rate(laps=tuple(found)) for name, found in laps.items()}


def prefill_task(model: SkipstoneForCausalLM, ids_BP: Tensor) -> Task:
    """The prompt alone, up to the first new token."""

    def lap() -> Lap:
        stop = _start(model.device)
        prefill(model, ids_BP)
        return stop(ids_BP.numel())

    return lap


def decode_task(model: SkipstoneForCausalLM, ids_BP: Tensor, new_tokens: int) -> Task:
    """`new_tokens` passes of one token a row after the prompt, which is not timed."""

    def lap() -> Lap:
        token_B1, cache = prefill(model, ids_BP)
        stop = _start(model.device)
        for token_B1 in _decoded(model, token_B1, cache, new_tokens):
            pass
        return stop(token_B1.numel() * new_tokens)

    return lap


@torch.no_grad()
def prefill(model: SkipstoneForCausalLM, ids_BP: Tensor) -> tuple[Tensor, Cache]:
    """The first new token [B, 1], and the cache."""
    out = model(ids_BP, use_cache=True, routing="causal", noise=False, logits_to_keep=1)
    return out.logits[:, -1:].argmax(-1), out.past_key_values


@torch.no_grad()
def _decoded(model: SkipstoneForCausalLM, token_B1: Tensor, cache: Cache, new_tokens: int) -> Iterator[Tensor]:
    for _ in range(new_tokens):
        out = model(token_B1, past_key_values=cache, use_cache=True, routing="causal", noise=False, logits_to_keep=1)
        token_B1 = out.logits[:, -1:].argmax(-1)
        yield token_B1


def _start(device: torch.device) -> Callable[[int], Lap]:
    """Start clock and meter; the result stops them."""
    meter = _meter(device)
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


_METERS: dict[torch.device, Meter | None] = {}


def _meter(device: torch.device) -> Meter | None:
    if device not in _METERS:
        _METERS[device] = find_meter(device)
    return _METERS[device]


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
