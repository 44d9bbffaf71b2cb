"""Figures of models whose gates are trained soft and executed hard: savings that are claimed and that are realised.

A soft gate only scales a block's update; a hard one keeps or skips it. `claimed` is the share of all (token, block)
pairs that the paper's metric counts as saved, one minus the mean of soft gates (arXiv 2605.05222). `skipped` is the
share that the executed pass leaves out. Both are taken over all blocks, gated or not.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.measure.flops import flop_check
from skipstone.measure.losses import measure_loss
from skipstone.measure.passes import PASSES, Pass, depth_layers
from skipstone.mechanisms.early_exit import EarlyExit
from skipstone.mechanisms.token_selective import TokenSelective
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone_studies import text_blocks

ROWS = 64  # rows of a forward pass
EXITS = (0.3, 0.5, 0.7, 0.9)
EPSILON = 1e-6  # mean gates are clamped to this distance from 0 and 1, so that their logit is finite
Figures = PlainDict
Layers = Sequence[Mapping[str, PlainMapping]]


def savings(evaluation: PlainMapping) -> Figures:
    """Return how much of the blocks' work gates claim to save, and how much a pass really skips.

    evaluation: the figures of a run as `skipstone eval --json` writes them. Keys of the result: `alpha`, the mean
    weight of the gates in the soft pass of training; `claimed`, the share of all (token, block) pairs that this weight
    counts as saved (arXiv 2605.05222); `skipped`, the share of these pairs that the pass representing the model
    (executed, if possible) really skips; `gap`, the loss of the pass that skips minus the loss of the soft pass, in
    nats. Figures of passes that were not run are absent.
    """
    ways = evaluation["ways"]
    found: Figures = {}
    if "oracle" in ways:
        open_L = [weight * capacity for weight, capacity in _gates(ways["oracle"]["layers"])]
        found |= {"alpha": _mean(open_L, 1.0), "claimed": sum(1 - a for a in open_L) / len(ways["oracle"]["layers"])}
    main = ways[evaluation["main"]]
    found["skipped"] = sum(1 - capacity for _, capacity in _gates(main["layers"])) / len(main["layers"])
    if "oracle" in ways and "executed" in ways:
        found["gap"] = ways["executed"]["loss"] - ways["oracle"]["loss"]
    return found


def _gates(layers: Layers) -> Iterator[tuple[float, float]]:
    """Yield, for each gated block, the mean weight of the kept tokens' updates and the share of tokens that it keeps.

    layers: the figures of each block's mechanisms, by name.
    """
    for layer in layers:
        for figures in layer.values():
            if "capacity" in figures:
                yield figures["weight"] or 0.0, figures["capacity"]


def _mean(values: Sequence[float], empty: float) -> float:
    return sum(values) / len(values) if values else empty


def variants(folder: Path) -> dict[str, float]:
    """Return losses, in nats, of one model with softly trained Token-Selective Attention when it is run in other ways.

    folder: its run folder. Keys: `gate` and `one`, passes that skip, in which a kept token's update has the weight of
    its gate or weight 1 (the paper's sparse mode); `random`, as `one`, but each block keeps random tokens, as many as
    its gates keep; `constant`, a soft pass with each gate replaced by its block's mean: by how much its loss exceeds
    that of the soft pass shows what the gates' choice among tokens is worth. `at_start` is not a loss but the share of
    (token, block) pairs that the paper's metric counts as saved before any training. The result is {} for other models.
    """
    loaded = load_run(folder)
    gates = [gate for gate in _found(loaded.model, TokenSelective) if gate.decision is None and gate.config.learn]
    if not gates:
        return {}
    start = sum(1 / (1 + math.exp(-gate.config.start_bias)) for gate in gates)
    found = {"at_start": start / loaded.model.config.num_hidden_layers}
    for gain in ("gate", "one"):
        _reset(gates, hard_gain=gain)
        found[gain], layers = _pass(loaded, PASSES["executed"])
    shares = tuple(capacity for _, capacity in _gates(layers))
    found["random"], _ = _pass(loaded, RandomMasks(name="random", routing="forced", shares=shares))
    _, layers = _pass(loaded, PASSES["oracle"])
    for gate, (weight, _) in zip(gates, _gates(layers), strict=True):
        weight = min(max(weight, EPSILON), 1 - EPSILON)
        gate.router.constant(math.log((1 - weight) / weight))
    found["constant"], _ = _pass(loaded, PASSES["oracle"])
    return found


def exits(folder: Path, thresholds: Sequence[float] = EXITS) -> dict[str, Figures]:
    """Return figures of a model with early exit at several thresholds; {} for other models.

    folder: the run folder. thresholds: thresholds of the exit gate, from 0 to 1. The result has, for each threshold
    under the key that `exit_name` gives it: `loss` in nats; `stretches`, a list of the losses on consecutive blocks of
    the text; `skipped`, the share of (token, block) pairs that is left out; `flops`, the FLOPs per token counted in the
    forward pass, which include the keys and values of all tokens and the routers.
    """
    loaded = load_run(folder)
    gates, found = _found(loaded.model, EarlyExit), {}
    for threshold in thresholds if gates else ():
        _reset(gates, threshold=threshold)
        loss, layers = _pass(loaded, PASSES["executed"])
        rows = _batches(loaded, 4 * ROWS)
        found[exit_name(threshold)] = {
            "loss": loss,
            text_blocks.RECORDED: list(text_blocks.of_loaded(loaded)),
            "skipped": sum(1 - capacity for _, capacity in _gates(layers)) / len(layers),
            "flops": flop_check(loaded.model, PASSES["executed"], rows).counted,
        }
    return found


def exit_name(threshold: float) -> str:
    """Return the key of an exit threshold among a run's figures: whole per cent, such as "50%" for 0.5."""
    return f"{threshold:.0%}"  # no dot: it is a step of a path into the figures


@dataclass(frozen=True, kw_only=True)
class RandomMasks(Pass):
    """A forward pass in which gates do not decide: each block with a gate keeps tokens at random.

    name: the pass's name. routing, executor: without effect. shares: the probabilities with which the blocks keep a
    token, one for each block with a gate. generator: the source of random numbers, seeded with 0.
    """

    shares: tuple[float, ...]
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    def arguments(self, model: SkipstoneForCausalLM, batch: Mapping[str, Tensor]) -> PlainDict:
        ids_BT = batch["input_ids"]
        masks = {
            layer: (torch.rand(ids_BT.shape, generator=self.generator) < share).to(ids_BT.device)
            for layer, share in zip(depth_layers(model), self.shares, strict=True)
        }
        return {**PASSES["oracle"].arguments(model, batch), "routing": masks}


def _found(model: SkipstoneForCausalLM, kind: type[Any]) -> list[Any]:
    return [module for module in model.routing_modules() if isinstance(module, kind)]


def _reset(gates: Sequence[Any], **options: object) -> None:
    for gate in gates:
        gate.config = replace(gate.config, **options)


def _pass(loaded: LoadedRun, forward: Pass) -> tuple[float, Layers]:
    found = measure_loss(loaded.model, forward, _batches(loaded), activations=False)
    return found.loss, found.summaries.layers()


def _batches(loaded: LoadedRun, rows: int | None = None) -> Iterator[dict[str, Tensor]]:
    assert loaded.data is not None
    return batches(loaded.data, ROWS, loaded.model.device, rows)
