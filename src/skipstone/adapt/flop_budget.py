"""A budget of executed FLOPs: choose capacities for it, set thresholds to it (package `budget`), count what is run.

A budget is a share of the forward FLOPs per token of the source, the dense checkpoint that is adapted, at rows of one
length, one row at a time; in a batch, rows that keep fewer tokens are padded, which costs more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence

import torch

from skipstone.budget.calibration import BATCH, meet
from skipstone.budget.handles import find_handles
from skipstone.data.rows import Row
from skipstone.measure.flops import count_flops
from skipstone.measure.passes import PASSES
from skipstone.mechanisms import DEPTH, DepthMechanism
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.cost import cost

HALVINGS = 30
WITHIN = 0.05  # the reached share may be this much of the budget away from it


def solve(config: SkipstoneConfig, budget: float, dense: float, tokens: int) -> tuple[float | None, float | None]:
    """Find the capacity of mechanisms that have one, or else the share of tokens that gates let pass, for a budget.

    config: configuration of the model with mechanisms. budget: forward FLOPs as a share of those of the source, the
    dense checkpoint that is adapted. dense: the source's forward FLOPs for a whole row of `tokens` tokens. Returns
    (capacity, None) if a mechanism such as Mixture-of-Depths has a capacity (the largest share of tokens that a block
    keeps), else (None, share). Raises ValueError for a budget that these mechanisms cannot reach.
    """
    with torch.device("meta"):
        model = SkipstoneForCausalLM(config)
    mixtures = [m for m in depth_mechanisms(model) if m.budget_by == "capacity"]
    gates = soft_gates(model)
    if not mixtures and not gates:
        names = [name for name, mechanism in DEPTH.items() if mechanism.budget_by is not None]
        raise ValueError(
            f"adapt.budget needs a mechanism that skips: {', '.join(names)} (neuron_groups take a capacity instead)"
        )

    def share(kept: float) -> float:
        for mechanism in mixtures:
            mechanism.set_capacity(kept)
        passing: dict[int, dict[str, float]] = {m.placement.layer: {} for m in gates}
        for m in gates if not mixtures else ():
            passing[m.placement.layer][m.placement.name] = kept * tokens
        return cost(model, tokens=tokens, kept={} if mixtures else passing).forward.total / dense

    kept = round(_crossing(share, budget), 4)
    return (kept, None) if mixtures else (None, kept)


def depth_mechanisms(model: SkipstoneForCausalLM) -> list[DepthMechanism]:
    """Return the depth mechanisms (those that let tokens skip blocks) of all blocks of `model`, in order."""
    return model.modules_of(DepthMechanism)


def soft_gates(model: SkipstoneForCausalLM) -> list[DepthMechanism]:
    """Return the gates of `model` that skip tokens whose score is below a configured threshold, except in training.

    In training they do not skip, but scale the updates. The list is empty if the model has no such mechanisms.
    """
    found = [(m, m.score_threshold()) for m in depth_mechanisms(model) if m.budget_by == "threshold"]
    return [m for m, threshold in found if threshold is not None and threshold.option is not None]


def close(model: SkipstoneForCausalLM) -> bool:
    """End the initial state in which mechanisms compute exactly what the dense model does.

    Options that this state overrode, such as the capacity, get their configured values; parameters stay. Returns
    whether any mechanism was in that state before the call.
    """
    ended = [mechanism.end_dense_start() for mechanism in model.routing_modules()]
    return any(ended)


def _crossing(share: Callable[[float], float], budget: float) -> float:
    low, high = 1e-4, 1.0
    if not share(low) <= budget <= share(high):
        raise ValueError(
            f"adapt.budget {budget:g} cannot be met: these mechanisms on these layers reach from {share(low):.3f} to "
            f"{share(high):.3f} of the dense FLOPs; route other or more layers"
        )
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if share(middle) < budget else (low, middle)
    return (low + high) / 2


def calibrate(model: SkipstoneForCausalLM, rows: Sequence[Row], budget: float, dense: float) -> None:
    """Set the model's saved thresholds so that passes that decide without later tokens meet the FLOP budget on `rows`.

    Mechanisms that decide by a trained predictor or by a fixed threshold stay as they are. rows: batches (tensors by
    name) of one row each. budget: forward FLOPs per token as a share of `dense`. dense: forward FLOPs per token of the
    dense checkpoint that is adapted.
    """
    model.eval()
    handles = [handle for handle in find_handles(model) if handle.saved]
    if handles:
        meet(model, handles, _batched(rows), budget * dense)


def _batched(rows: Sequence[Row]) -> list[Row]:
    """Return batches of one row each as batches of up to `BATCH` rows that have the same fields and length."""
    alike: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        alike[tuple((name, x.shape) for name, x in row.items())].append(row)
    parts = [found[i : i + BATCH] for found in alike.values() for i in range(0, len(found), BATCH)]
    return [{name: torch.cat([row[name] for row in part]) for name in part[0]} for part in parts]


def counted(model: SkipstoneForCausalLM, rows: Sequence[Row]) -> float:
    """Return the forward FLOPs per token of passes that decide without later tokens and really skip.

    They are counted while the passes run. model: the model to run, in evaluation mode. rows: batches (tensors by name)
    of one row each.
    """
    forward = PASSES["executed"]
    total = sum(count_flops(lambda row=row: forward.run(model, row)).total for row in rows)  # type: ignore[misc]
    return total / sum(row["input_ids"].numel() for row in rows)
