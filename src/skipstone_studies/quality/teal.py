"""TEAL as a control: a dense model whose MLPs get small inputs set to 0, without training (arXiv 2408.14690).

    x~ = x where |x| > t, else 0        before W_gate and W_up with one t, before W_down with another

The thresholds are quantiles of |x| over calibration tokens, so that a share `sparsity` of the inputs falls below them,
in every layer alike (the paper's uniform allocation; its greedy one distributes the same mean over layers by measured
error). Columns of a weight whose input is 0 need not be multiplied, which saves this share of the MLP's FLOPs, for one
token at a time. Only the loss is measured here: nothing is skipped, and the realised shares are reported.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import Pass
from skipstone.model.causal_lm import SkipstoneForCausalLM

INPUTS = ("gate_proj", "up_proj", "down_proj")  # gate and up have the same input
Batches = Iterable[Mapping[str, Tensor]]
SAMPLE = 1_000_000  # largest number of input values for a quantile


@dataclass
class Site:
    """A forward pre-hook of one matrix that sets small inputs to 0 (TEAL, arXiv 2408.14690).

    magnitudes: |x| of a sample of the inputs, collected while threshold is None. threshold: inputs with |x| at or below
    it become 0. inputs, zeros: how many inputs were seen since the threshold was set, and how many of them became 0.
    """

    magnitudes: list[Tensor] = field(default_factory=list)
    threshold: float | None = None
    inputs: int = 0
    zeros: int = 0

    def __call__(self, module: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x = arguments[0]
        if self.threshold is None:
            values = x.detach().abs().flatten().float()
            self.magnitudes.append(values[:: max(1, len(values) * 16 // SAMPLE)].cpu())
            return None
        small = x.abs() <= self.threshold
        self.inputs += small.numel()
        self.zeros += int(small.sum())
        return (x.masked_fill(small, 0.0),)

    def settle(self, sparsity: float) -> None:
        """Set the threshold so that the share `sparsity` of the inputs that were collected has |x| at or below it."""
        ordered = torch.cat(self.magnitudes).sort().values
        self.threshold = float(ordered[min(int(sparsity * len(ordered)), len(ordered) - 1)])
        self.magnitudes = []


@dataclass(frozen=True, kw_only=True)
class Thresholded:
    """The loss of a model with small inputs of its MLPs set to 0, and how many these were.

    loss: nats per prediction. sparsity: share of zeros among the inputs of all MLP matrices, weighted by the matrices'
    sizes.
    """

    loss: float
    sparsity: float


def measure_teal(
    model: SkipstoneForCausalLM, forward: Pass, calibration: Batches, batches: Batches, sparsity: float
) -> Thresholded:
    """Return the loss of a model with small inputs of its MLP matrices set to 0, and the share that became 0.

    The method is TEAL (arXiv 2408.14690), which needs no training. forward: the way to run the forward pass, such as
    `PASSES["executed"]`. calibration: batches from which thresholds are taken, as quantiles of |x|. batches: the
    batches on which the loss is measured. sparsity: share of each matrix's inputs that is to be set to 0, in [0, 1).
    Everything is computed, so no time is saved. Raises ValueError for a sparsity outside of this range, and for a model
    without gated MLPs.
    """
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be in [0, 1), got {sparsity}")
    with _sites(model) as sites:
        for batch in calibration:
            forward.run(model, batch)
        for _, site in sites:
            site.settle(sparsity)
        loss = measure_loss(model, forward, batches, activations=False).loss
    weights = [module.weight.numel() for module, _ in sites]
    zeros = sum(n * site.zeros / max(site.inputs, 1) for n, (_, site) in zip(weights, sites, strict=True))
    return Thresholded(loss=loss, sparsity=zeros / sum(weights))


@contextmanager
def _sites(model: SkipstoneForCausalLM) -> Iterator[list[tuple[Any, Site]]]:
    """Register a `Site` at every matrix of every MLP during a `with` block; yield the list of (matrix, site)."""
    blocks = model.model.layers
    if any(not isinstance(getattr(block.mlp, name, None), nn.Linear) for block in blocks for name in INPUTS):
        raise ValueError(f"thresholds need gated MLPs of three matrices, this model has mlp {model.config.mlp!r}")
    modules = [getattr(block.mlp, name) for block in blocks for name in INPUTS]
    sites = [(module, Site()) for module in modules]
    hooks = [module.register_forward_pre_hook(site) for module, site in sites]
    try:
        yield sites
    finally:
        for hook in hooks:
            hook.remove()
