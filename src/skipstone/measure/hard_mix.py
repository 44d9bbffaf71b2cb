"""The loss of a model whose neurons each use their strongest activation alone, beside that of the mix."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from skipstone.measure.losses import LossResult, measure_loss
from skipstone.measure.passes import Pass
from skipstone.mechanisms.mix_figures import MixFigures
from skipstone.model.causal_lm import SkipstoneForCausalLM

NO_TEMPERATURE = 1e-30  # logits by this are still finite


def measure_hard_mix(
    model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]]
) -> LossResult | None:
    """None for a model that does not mix activations."""
    if not _temperatures(model):
        return None
    with hard_mix(model):
        return measure_loss(model, forward, batches, activations=False)


@contextmanager
def hard_mix(model: SkipstoneForCausalLM) -> Iterator[None]:
    """Inside, the mix is taken at a temperature of next to 0."""
    taus = _temperatures(model)
    before = [tau.clone() for tau in taus]
    try:
        for tau in taus:
            tau.fill_(max(NO_TEMPERATURE, torch.finfo(tau.dtype).tiny))
        yield
    finally:
        for tau, value in zip(taus, before, strict=True):
            tau.copy_(value)


def _temperatures(model: SkipstoneForCausalLM) -> list[Tensor]:
    return [mechanism.tau for mechanism in model.routing_modules() if isinstance(mechanism, MixFigures)]
