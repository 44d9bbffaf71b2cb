"""The thresholds of a model that decide which tokens are kept, behind one interface wherever a mechanism holds them.

A token is kept where its score is above the threshold. The score is what records hold, so that a calibration reads it
from ordinary passes: a router's logit, or the logit of a gate's gain.

Shape letters: B rows, T tokens, N tokens that were asked.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import DepthRecord, Records
from skipstone.core.routing_module import require_causal
from skipstone.mechanisms import EarlyExit, TokenSelective
from skipstone.mechanisms.decisions import EmaThreshold
from skipstone.model.build import parse_mechanisms
from skipstone.model.causal_lm import SkipstoneForCausalLM

State = list[float | None]
LARGEST_LOGIT = 30.0  # a gain of 1 - 1e-13: above all that fp32 can hold, and still below 1
EPSILON = 1e-12


def is_gate(mechanism: Any) -> bool:
    """Whether a threshold on the mechanism's gain decides which tokens are left out."""
    if isinstance(mechanism, TokenSelective):
        return mechanism.decision is None and mechanism.config.execution == "hard"
    return isinstance(mechanism, EarlyExit) and mechanism.config.execution == "hard"


class ThresholdHandle:
    """One threshold, of one block or of several that share it.

    name: blocks and mechanism. saved: whether a saved model keeps what was set.
    """

    saved = True

    def __init__(self, name: str, mechanisms: Sequence[Any]) -> None:
        self.name, self.mechanisms = name, list(mechanisms)

    @property
    def threshold(self) -> float:
        """The score above which a token is kept."""
        raise NotImplementedError

    def set(self, threshold: float) -> None:
        raise NotImplementedError

    def state(self) -> State:
        """Return everything that `set` changes, to the bit."""
        raise NotImplementedError

    def restore(self, state: State) -> None:
        raise NotImplementedError

    def scores(self, records: Sequence[Records]) -> Tensor:
        """Return the scores [N] of all tokens of a pass that reached the mechanism."""
        found = [records[m.placement.layer].get(m.placement.name) for m in self.mechanisms]
        # None: inside a block that kept nobody
        parts = [self._scores(r)[r.reached_BT] for r in found if isinstance(r, DepthRecord)]
        return torch.cat(parts) if parts else torch.empty(0)

    def _scores(self, record: DepthRecord) -> Tensor:
        return record.score_BT


class EmaHandle(ThresholdHandle):
    """The threshold of `ema_threshold`, a buffer of the model."""

    @property
    def _decision(self) -> EmaThreshold:
        return self.mechanisms[0].decision  # type: ignore[no-any-return]

    @property
    def threshold(self) -> float:
        return float(self._decision.threshold)

    def set(self, threshold: float) -> None:
        self._decision.threshold.fill_(threshold)
        self._decision.steps.clamp_(min=1)  # set from text, it is as ready as one that followed a training

    def state(self) -> State:
        return [self.threshold, float(self._decision.steps)]

    def restore(self, state: State) -> None:
        for buffer, value in zip((self._decision.threshold, self._decision.steps), state, strict=True):
            buffer.fill_(value)  # type: ignore[arg-type]


class FixedHandle(ThresholdHandle):
    """The threshold of decisions `threshold` and `threshold_p`, a number that follows from the options when a model is
    loaded.
    """

    saved = False

    @property
    def threshold(self) -> float:
        return float(self.mechanisms[0].decision.line)

    def set(self, threshold: float) -> None:
        self.mechanisms[0].decision.line = threshold

    def state(self) -> State:
        return [self.threshold]

    def restore(self, state: State) -> None:
        self.mechanisms[0].decision.line = state[0]


class GateHandle(ThresholdHandle):
    """The threshold of an entry of the configuration, which all of its blocks share.

    Early exit needs them equal, or a token that has left could come back; gains are comparable between blocks as they
    are, for each is the factor on an update.
    """

    def __init__(self, name: str, mechanisms: Sequence[Any], entry: dict[str, Any]) -> None:
        super().__init__(name, mechanisms)
        self.entry = entry

    @property
    def _skips_below(self) -> bool:
        """Whether the threshold is of what is kept (survival), not of what is lost (p = 1 - gain)."""
        return isinstance(self.mechanisms[0], EarlyExit)

    @property
    def threshold(self) -> float:
        threshold = self.mechanisms[0].config.threshold
        logit = math.log(threshold / (1 - threshold))
        return logit if self._skips_below else -logit

    def set(self, threshold: float) -> None:
        logit = min(max(threshold, -LARGEST_LOGIT), LARGEST_LOGIT)
        gain = 1 / (1 + math.exp(-logit if self._skips_below else logit))
        self.restore([gain, gain])

    def state(self) -> State:
        return [self.mechanisms[0].config.threshold, self.entry.get("threshold")]

    def restore(self, state: State) -> None:
        threshold, written = state
        for mechanism in self.mechanisms:
            mechanism.config = replace(mechanism.config, threshold=threshold)
        if written is None:
            self.entry.pop("threshold", None)
        else:
            self.entry["threshold"] = written

    def _scores(self, record: DepthRecord) -> Tensor:
        if not self._skips_below:
            return record.score_BT
        survival_BT = record.carry.get(
            self.mechanisms[0].placement.name, record.score_BT
        )  # none where nobody was asked
        return torch.logit(survival_BT.double(), eps=EPSILON)


def find_handles(model: SkipstoneForCausalLM) -> list[ThresholdHandle]:
    """Every threshold on scores in the model, outermost mechanisms first, then by block; none where nothing skips."""
    blocks: Any = model.model.layers
    handles: list[ThresholdHandle] = []
    for entry, values in zip(parse_mechanisms(model.config), model.config.mechanisms or [], strict=True):
        mechanisms = [blocks[layer].mechanisms[entry.key] for layer in entry.layers]
        if mechanisms and is_gate(mechanisms[0]):
            handles.append(GateHandle(f"{_blocks(entry.layers)} {entry.key}", mechanisms, values))
        else:
            handles += _single(mechanisms)
    return handles


def _single(mechanisms: Sequence[Any]) -> Iterator[ThresholdHandle]:
    for m in mechanisms:
        decision = getattr(m, "decision", None)
        if decision is None or m.capacity >= 1 or getattr(m.config, "execution", "hard") == "soft":
            continue
        if isinstance(decision, EmaThreshold):
            yield EmaHandle(f"{m.placement.layer} {m.placement.name}", [m])
        elif hasattr(decision, "line"):
            yield FixedHandle(f"{m.placement.layer} {m.placement.name}", [m])


def require_handles(model: SkipstoneForCausalLM) -> list[ThresholdHandle]:
    """`find_handles`. Raises ValueError for a model without any, naming what it has, or without causal passes."""
    require_causal(model.routing_modules())
    handles = find_handles(model)
    if not handles:
        raise ValueError(
            "a budget sets thresholds on scores: those of mixture_of_depths, token_selective and gate_skip with "
            "decision ema_threshold, threshold or threshold_p, and of token_selective and early_exit executed hard; "
            f"this model has {_described(model)}"
        )
    return handles


def _described(model: SkipstoneForCausalLM) -> str:
    found = []
    for values in model.config.mechanisms or []:
        told = {key: values[key] for key in ("decision", "capacity", "execution") if key in values}
        found.append(values["name"] + "".join(f", {key} {value!r}" for key, value in told.items()))
    return "; ".join(found) or "no mechanism"


def _blocks(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
