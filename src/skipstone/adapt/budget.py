"""The executed-FLOPs budget: what capacities promise it, how thresholds are set to meet it, and what is reached.

A budget is a share of the dense source's forward FLOPs a token, at rows of one length, one row at a time: in a batch,
rows that keep fewer tokens are filled up, and that is the batch's doing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from skipstone.core.records import Records
from skipstone.data.rows import Row
from skipstone.evaluate.flops import count_flops
from skipstone.evaluate.ways import WAYS
from skipstone.mechanisms import EarlyExit, GateSkip, MixtureOfDepths, TokenSelective
from skipstone.mechanisms.decisions import EmaThreshold
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.cost import cost, kept_from_records

HALVINGS = 30
PASSES, SETTLING = 6, 2  # thresholds depend on what blocks before leave; after two looks the capacity is corrected, too
WITHIN = 0.05  # the reached share may be this much of the budget away from it
CAPACITIES = ("mixture_of_depths", "gate_skip")  # mechanisms whose capacity is the dial
REACH = 15.0  # thresholds of gates are looked for between the logits -REACH and REACH


def is_dial(mechanism: Any) -> bool:
    """Whether it is a gate whose threshold says who is left out."""
    return isinstance(mechanism, TokenSelective | EarlyExit) and mechanism.config.execution == "hard"


def solve(config: SkipstoneConfig, budget: float, dense: float, tokens: int) -> tuple[float | None, float | None]:
    """The capacity of every mechanism that has one, or else the share that gates should let pass, for this budget.

    dense: the source's FLOPs of a row of `tokens` tokens. Raises ValueError for a budget that cannot be met.
    """
    with torch.device("meta"):
        model = SkipstoneForCausalLM(config)
    mixtures = [m for m in model.adjustables() if isinstance(m, MixtureOfDepths | GateSkip)]
    gates = [m for m in model.adjustables() if is_dial(m)]
    if not mixtures and not gates:
        raise ValueError(
            "adapt.budget needs a mechanism that skips: mixture_of_depths, token_selective, early_exit or gate_skip"
        )

    def share(kept: float) -> float:
        for mechanism in mixtures:
            _pin(mechanism, kept)
        passing: dict[int, dict[str, float]] = {m.place.layer: {} for m in gates}
        for m in gates if not mixtures else ():
            passing[m.place.layer][m.place.name] = kept * tokens
        return cost(model, tokens=tokens, kept={} if mixtures else passing).forward.total / dense

    kept = round(_crossing(share, budget, dense), 4)
    return (kept, None) if mixtures else (None, kept)


def _pin(mechanism: MixtureOfDepths | GateSkip, capacity: float) -> None:
    if isinstance(mechanism, MixtureOfDepths):
        mechanism.decision.capacity.pin(capacity)
    else:
        mechanism.capacity = capacity


def close(model: SkipstoneForCausalLM) -> bool:
    """Give gates that started with every token kept the capacity of their options; whether there are any."""
    gates = [m for m in model.adjustables() if isinstance(m, GateSkip)]
    for mechanism in gates:
        mechanism.capacity = mechanism.config.capacity
    return bool(gates)


def _crossing(share: Callable[[float], float], budget: float, dense: float) -> float:
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


@torch.no_grad()
def calibrate(model: SkipstoneForCausalLM, rows: Sequence[Row], budget: float, dense: float) -> None:
    """Set the thresholds of decisions, or else those of gates, so that causal passes over `rows` execute the budget.

    dense: the source's FLOPs a token. Decisions by a trained predictor or a fixed threshold stay as they are.
    """
    model.eval()
    ranked = [m for m in model.adjustables() if isinstance(getattr(m, "decision", None), EmaThreshold)]
    shift, reached = 0.0, math.inf
    for number in range(PASSES if ranked else 0):
        scores, reached = _observed(model, ranked, rows, dense)
        if number >= SETTLING:
            shift += (budget - reached) / _slope(model, ranked, rows, dense)
        for mechanism, score_N in zip(ranked, scores, strict=True):
            capacity = min(max(mechanism.capacity + shift, 0.0), 1.0)
            if len(score_N):
                mechanism.decision.threshold.fill_(_quantile(score_N, 1 - capacity))
                mechanism.decision.steps.clamp_(min=1)
    if any(map(is_dial, model.adjustables())) and abs(reached / budget - 1) > WITHIN / 2:
        _calibrate_gates(model, rows, budget * dense)


def _observed(
    model: SkipstoneForCausalLM, ranked: Sequence[Any], rows: Sequence[Row], dense: float
) -> tuple[list[torch.Tensor], float]:
    """Scores of all tokens that each mechanism was asked about, and the share of the dense FLOPs that was needed."""
    scores: list[list[torch.Tensor]] = [[] for _ in ranked]
    total = tokens = 0.0
    for row in rows:
        records = WAYS["executed"].run(model, row, output_records=True).records or ()
        for mechanism, found in zip(ranked, scores, strict=True):
            record: Any = records[mechanism.place.layer][mechanism.place.name]
            found.append(record.score_BT[record.asked_BT])
        total += _needed(model, row, records)
        tokens += row["input_ids"].numel()
    return [torch.cat(found) for found in scores], total / tokens / dense


def _quantile(x_N: torch.Tensor, share: float) -> float:
    """A number with this share of the values at or below it; below all of them for 0."""
    ordered = x_N.sort().values
    at = round(share * len(ordered))
    if at == 0:
        return float(ordered[0]) - 1.0
    return float((ordered[at - 1] + ordered[min(at, len(ordered) - 1)]) / 2)


def _slope(model: SkipstoneForCausalLM, ranked: Sequence[Any], rows: Sequence[Row], dense: float) -> float:
    """How the needed share grows with the capacity, by the cost model."""
    tokens = rows[0]["input_ids"].shape[1]

    def share(capacity: float) -> float:
        kept: dict[int, dict[str, float]] = {}
        for mechanism in ranked:
            kept.setdefault(mechanism.place.layer, {})[mechanism.place.name] = capacity * tokens
        return cost(model, tokens=tokens, kept=kept).forward.total / tokens / dense

    middle = sum(mechanism.capacity for mechanism in ranked) / len(ranked)
    low, high = max(middle - 0.1, 0.01), min(middle + 0.1, 1.0)
    return (share(high) - share(low)) / (high - low)


def _calibrate_gates(model: SkipstoneForCausalLM, rows: Sequence[Row], target: float) -> None:
    low, high = -REACH, REACH
    for _ in range(HALVINGS // 2):
        middle = (low + high) / 2
        set_least_gain(model, 1 / (1 + math.exp(-middle)))
        low, high = (middle, high) if needed(model, rows) > target else (low, middle)


def set_least_gain(model: SkipstoneForCausalLM, gain: float) -> None:
    """Executed hard, gates keep a token whose gain is above this; in the modules and in the configuration."""
    kinds: dict[str, float] = {}
    for mechanism in filter(is_dial, model.adjustables()):
        threshold = 1 - gain if isinstance(mechanism, TokenSelective) else gain
        mechanism.config = replace(mechanism.config, threshold=threshold)
        kinds["token_selective" if isinstance(mechanism, TokenSelective) else "early_exit"] = threshold
    for entry in model.config.mechanisms or []:
        if entry["name"] in kinds and entry.get("execution", "hard") == "hard":
            entry["threshold"] = kinds[entry["name"]]


@torch.no_grad()
def needed(model: SkipstoneForCausalLM, rows: Sequence[Row]) -> float:
    """FLOPs a token that causal passes need, by the cost model, from what was decided."""
    return _observed(model, [], rows, 1.0)[1]


def _needed(model: SkipstoneForCausalLM, row: Row, records: Sequence[Records]) -> float:
    size, length = row["input_ids"].shape
    kept = kept_from_records(model, records, rows="mean")
    return cost(model, tokens=length, batch=size, kept=kept).forward.total


def counted(model: SkipstoneForCausalLM, rows: Sequence[Row]) -> float:
    """FLOPs a token, counted on the operations of causal passes while they run; `rows` hold one row each."""
    way = WAYS["executed"]
    total = sum(count_flops(lambda row=row: way.run(model, row)).total for row in rows)  # type: ignore[misc]
    return total / sum(row["input_ids"].numel() for row in rows)
