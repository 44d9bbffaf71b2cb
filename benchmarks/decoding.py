"""What benchmarks of decoding share: prompts in a cache that are gone on from again and again, thresholds set by text.

All text is random; both models of a comparison continue the same prompts with the same tokens, one a row and step.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.speed import Lap

CALIBRATION = 32  # rows of text that a threshold is set by, at least


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model, the tokens of a prompt, the steps of a turn and the turns."""

    width: int
    blocks: int
    vocabulary: int
    prompt: int = 64
    steps: int = 48
    turns: int = 15


def model_of(size: Size, mechanisms: Sequence[dict[str, Any]]) -> SkipstoneForCausalLM:
    """Random weights, the same whatever routes; heads of 64 channels."""
    torch.manual_seed(0)
    config = SkipstoneConfig(
        vocab_size=size.vocabulary,
        hidden_size=size.width,
        num_hidden_layers=size.blocks,
        num_attention_heads=size.width // 64,
        mechanisms=list(mechanisms),
    )
    return SkipstoneForCausalLM(config).eval()


def text(size: Size, rows: int, length: int, seed: int) -> Tensor:
    return torch.randint(0, size.vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def routers(model: SkipstoneForCausalLM) -> Iterator[tuple[int, str, Any]]:
    for i, block in enumerate(model.model.layers):
        for name, mechanism in block.mechanisms.items():
            yield i, name, mechanism


@torch.inference_mode()
def calibrate(model: SkipstoneForCausalLM, ids: Tensor, first: int = 0) -> None:
    """Each threshold at the quantile of its scores, block after block, over the tokens from `first` on."""
    for i, name, mechanism in routers(model):
        record = model(ids, use_cache=False, output_records=True).records[i][name]
        scores = record.score_BT[:, first:].flatten()
        mechanism.decision.threshold.copy_(scores.quantile(1 - mechanism.capacity))
        mechanism.decision.steps.fill_(1)


class Decoding:
    """A prompt in the cache; every turn feeds other tokens."""

    def __init__(self, model: SkipstoneForCausalLM, size: Size, rows: int) -> None:
        self.model, self.size, self.rows = model, size, rows
        self.cache, self.turns = DynamicCache(config=model.config), itertools.count()
        self.prompts = text(size, rows, size.prompt, seed=2)
        prompts = self.prompts.repeat(-(-CALIBRATION // rows), 1)
        calibrate(model, torch.cat([prompts, text(size, len(prompts), size.steps, seed=1)], dim=1), size.prompt)
        with torch.inference_mode():
            model(self.prompts, past_key_values=self.cache)

    @torch.inference_mode()
    def lap(self) -> Lap:
        fed = text(self.size, self.rows, self.size.steps, seed=100 + next(self.turns)).split(1, dim=1)
        start = time.perf_counter()
        for token in fed:
            self.model(token, past_key_values=self.cache).logits[:, -1].argmax(-1)
        seconds = time.perf_counter() - start
        self.cache.crop(-self.size.steps)
        return Lap(tokens=self.rows * self.size.steps, seconds=seconds, joules=None)

    @torch.inference_mode()
    def computed(self) -> float:
        """Rows a step that a block with a mechanism computes, in the mean of the turns."""
        kept = []
        for turn in range(self.size.turns + 1):
            for token in text(self.size, self.rows, self.size.steps, seed=100 + turn).split(1, dim=1):
                out = self.model(token, past_key_values=self.cache, output_records=True)
                kept += [out.records[i][name].kept_BT.sum().item() for i, name, _ in routers(self.model)]
            self.cache.crop(-self.size.steps)
        return statistics.fmean(kept)
