"""FLOPs and host syncs of a forward pass, counted while it runs, beside what the cost model says of the same pass."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from skipstone.measure.flops import count_flops, count_host_syncs
from skipstone.measure.passes import Pass
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import cost, kept_from_records

COUNTED_BATCHES = 4  # FLOPs are counted on so many


@dataclass(frozen=True, kw_only=True)
class FlopCheck:
    """Forward FLOPs per token of whole rows without a cache, padding counted as a token because it is computed.

    counted: of the operations that ran. predicted: `cost` for what the records say was kept. needed: the same without
    the columns that only fill up rows which keep fewer than the widest of their batch. dense: `cost` without
    mechanisms. syncs: times a forward pass made the host wait, in the mean. unknown: operations that ran and that the
    counter does not know; the count is not to be trusted while there are any.
    """

    counted: float
    predicted: float
    needed: float
    dense: float
    syncs: float
    unknown: tuple[str, ...]

    @property
    def agree(self) -> bool:
        """Equal but for the rounding of a division."""
        return abs(self.counted - self.predicted) <= 1e-9 * max(self.counted, 1) and not self.unknown

    @property
    def share(self) -> float:
        """Of the dense model's."""
        return self.counted / self.dense


def flop_check(model: SkipstoneForCausalLM, forward: Pass, batches: Iterable[Mapping[str, Tensor]]) -> FlopCheck:
    """Means over the batches."""
    totals, passes = dict.fromkeys(("counted", "predicted", "needed", "dense", "tokens", "syncs"), 0.0), 0
    unknown: set[str] = set()
    for batch in batches:
        run = partial(forward.run, model, batch)
        found = count_flops(run)
        for name, value in {**_predicted(model, forward, batch), "counted": found.total}.items():
            totals[name] += value
        totals["tokens"] += batch["input_ids"].numel()
        totals["syncs"] += count_host_syncs(run).total()
        unknown |= {*found.unknown}
        passes += 1
    tokens, syncs = totals.pop("tokens"), totals.pop("syncs")
    per_token = {name: value / tokens for name, value in totals.items()}
    return FlopCheck(**per_token, syncs=syncs / passes, unknown=tuple(sorted(unknown)))


def _predicted(model: SkipstoneForCausalLM, forward: Pass, batch: Mapping[str, Tensor]) -> dict[str, float]:
    """FLOPs of the batch by the cost model, for the decisions that the pass takes."""
    rows, length = batch["input_ids"].shape
    records = forward.run(model, batch, output_records=True).records or ()
    widest, mean = (
        cost(
            model,
            tokens=length,
            batch=rows,
            routing=forward.routing,
            kept=kept_from_records(model, records, rows=which),
        )
        for which in ("widest", "mean")
    )
    assert widest.dense is not None
    return {
        "predicted": widest.forward.total,
        "needed": mean.forward.total,
        "dense": widest.dense.forward.total,
    }
