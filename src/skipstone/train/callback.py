"""`RoutingCallback` advances thresholds and schedules once per optimizer step; forward passes never do."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from skipstone.core.records import Records
from skipstone.core.routing_module import RoutingModule

NOTHING_SEEN = (
    "RoutingCallback was shown no records, so that schedules move but thresholds do not: train with "
    "skipstone.train.RoutingTrainer, or mix skipstone.train.RoutingMixin into your own trainer"
)


class RoutingCallback(TrainerCallback):
    """A callback for any `transformers.Trainer` that moves routing thresholds and schedules after each optimizer step.

    Used alone, it advances only what depends on training progress, such as PolyGLU's temperature tau. Thresholds
    learned from scores (decision `ema_threshold`) also need `observe` to be called with the records of each
    micro-batch, as `RoutingTrainer` and `RoutingMixin` do. All state is in buffers of the model, so checkpoints contain
    it and a resumed run continues exactly.

    schedules: False for fine-tuning a trained routed model: whatever depends on progress (capacity warm-up, exploration
    noise, tau) stays at its final value, while thresholds keep following the scores.
    """

    def __init__(self, schedules: bool = True) -> None:
        self.schedules = schedules
        self.saves_whole_model = False  # whether adapters are saved together with their base model
        self._sums: dict[tuple[int, str], Tensor] = {}  # for each statistic, its sums and their counts
        self._warned = False
        self._before: dict[str, Tensor] = {}  # initial buffers that training may move and adapters do not save

    @torch.no_grad()
    def observe(self, model: Any, records: tuple[Records, ...] | None) -> None:
        """Accumulate the routing statistics of one training micro-batch, without a wait of the CPU for the device.

        The thresholds are moved at the end of the optimizer step, by the means over its micro-batches. model: the
        trained model, wrapped or not; models without our mechanisms are ignored. records: what each mechanism decided
        in the pass, one dict by mechanism name for each block; None adds nothing.
        """
        for mechanism in _mechanisms(model) if records is not None else ():
            key = (mechanism.placement.layer, mechanism.placement.name)
            record = records[key[0]].get(key[1])  # type: ignore[index]
            statistics = None if record is None else mechanism.statistics(record)
            if statistics is not None:
                seen = statistics.isfinite()
                pair = torch.stack((torch.where(seen, statistics, 0.0), seen.to(statistics)))
                self._sums[key] = self._sums[key] + pair if key in self._sums else pair

    def forget(self) -> None:
        """Discard the statistics of the current optimizer step, for a step that is skipped as not finite."""
        self._sums = {}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        self._sums = {}
        outside = () if self.saves_whole_model else _outside_adapters(kwargs["model"])
        self._before = {name: value.clone() for name, value in outside}
        self._advance(kwargs["model"], state, {})

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: object
    ) -> None:
        means, self._sums = _means(self._sums), {}
        self._advance(kwargs["model"], state, means)
        self._warn_of_adapters(kwargs["model"])
        if not means and not self._warned and any(_waiting(m) for m in _mechanisms(kwargs["model"])):
            self._warned = True
            warnings.warn(NOTHING_SEEN, stacklevel=2)

    def _warn_of_adapters(self, model: Any) -> None:
        """Warn once if a buffer has changed that neither a saved adapter (PEFT) nor its checkpoint would contain."""
        moved = [n for n, value in _outside_adapters(model) if n in self._before and not value.equal(self._before[n])]
        if moved:
            self._before = {}
            shown = ", ".join(moved[:3]) + (f" and {len(moved) - 3} more" if len(moved) > 3 else "")
            warnings.warn(
                f"training moves buffers that no adapter holds: {shown}; a saved adapter starts from the base model's, "
                "and so does a run that is resumed: keep them by model.merge_and_unload().save_pretrained(FOLDER)",
                stacklevel=2,
            )

    @torch.no_grad()
    def _advance(self, model: Any, state: TrainerState, means: dict[tuple[int, str], Tensor]) -> None:
        progress = state.global_step / max(state.max_steps, 1) if self.schedules else 1.0
        for mechanism in _mechanisms(model):
            mechanism.advance(progress, means.get((mechanism.placement.layer, mechanism.placement.name)))


def _mechanisms(model: Any) -> Iterator[RoutingModule]:
    """Yield the routing modules of a Skipstone model inside any wrapper; none for other models."""
    while not hasattr(model, "routing_modules") and hasattr(model, "module"):
        model = model.module
    return model.routing_modules() if hasattr(model, "routing_modules") else iter(())


def _outside_adapters(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the buffers of mechanisms that a model wrapped by PEFT would save as a whole, by name; none for others.

    An adapter that PEFT saves does not contain them. model: the model, wrapped or not.
    """
    while getattr(model, "peft_config", None) is None:
        if not hasattr(model, "module"):
            return
        model = model.module
    for mechanism in _mechanisms(model):
        saved = mechanism.state_dict()
        where = f"block {mechanism.placement.layer} {mechanism.placement.name}"
        yield from ((f"{where} {name}", value) for name, value in mechanism.named_buffers() if name in saved)


def _waiting(mechanism: RoutingModule) -> bool:
    """Return whether the mechanism has a threshold that should follow its scores but has never moved."""
    return mechanism.follows_scores and mechanism.not_ready_reason() is not None


def _means(sums: dict[tuple[int, str], Tensor]) -> dict[tuple[int, str], Tensor]:
    """Return the mean of each statistic over micro-batches and processes, by (index of the block, mechanism's name).

    sums: for each key, fp32 [2, N] sums of N statistics, and of how many were finite. Keys are left out if a statistic
    has no finite value. There is at most one host sync.
    """
    if not sums:
        return {}
    total = torch.cat(list(sums.values()), dim=1)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(total)
    counts = total[1].tolist()
    means: dict[tuple[int, str], Tensor] = {}
    at = 0
    for key, pair in sums.items():
        end = at + pair.shape[1]
        if all(counts[at:end]):
            means[key] = total[0, at:end] / total[1, at:end]
        at = end
    return means
