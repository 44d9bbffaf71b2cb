"""The thresholds of a model that decide which tokens are kept, behind one interface wherever a mechanism holds them.

A token is kept where its score is above the threshold. The score is what records hold, so that a calibration reads it
from ordinary passes: a router's logit, or the logit of a gate's gain.

Shape letters: B rows, T tokens, N tokens that were asked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from skipstone.core.records import DepthRecord, Records, find
from skipstone.core.routing_module import require_causal
from skipstone.core.threshold import ScoreThreshold, State
from skipstone.mechanisms import DepthMechanism
from skipstone.model.build import parse_mechanisms
from skipstone.model.causal_lm import SkipstoneForCausalLM


class ThresholdHandle:
    """One threshold, of one block or, where the options hold it, of all blocks of an entry.

    name: blocks and mechanism. entry: the entry of the configuration that a saved model keeps the option in.
    """

    def __init__(self, mechanisms: Sequence[DepthMechanism], entry: dict[str, Any]) -> None:
        placements = [m.placement for m in mechanisms]
        self.name = f"{_blocks([p.layer for p in placements])} {placements[0].name}"
        self._placements, self._entry = placements, entry
        self._thresholds: list[ScoreThreshold] = [t for m in mechanisms if (t := m.score_threshold()) is not None]
        self._option = self._thresholds[0].option

    @property
    def saved(self) -> bool:
        """Whether a saved model keeps what was set."""
        return self._thresholds[0].saved

    @property
    def threshold(self) -> float:
        """The score above which a token is kept."""
        return self._thresholds[0].get()

    def set(self, threshold: float) -> None:
        for each in self._thresholds:
            each.set(threshold)
        if self._option is not None:
            self._entry[self._option] = self._thresholds[0].state()[0]

    def state(self) -> State:
        """Return everything that `set` changes, to the bit."""
        state = self._thresholds[0].state()
        return state if self._option is None else [*state, self._entry.get(self._option)]

    def restore(self, state: State) -> None:
        if self._option is not None:
            *state, written = state
            self._entry.pop(self._option, None)
            if written is not None:
                self._entry[self._option] = written
        for each in self._thresholds:
            each.restore(state)

    def scores(self, records: Sequence[Records]) -> Tensor:
        """Return the scores [N] of all tokens of a pass that reached the mechanism."""
        parts = []
        for placement, threshold in zip(self._placements, self._thresholds, strict=True):
            record = find(records[placement.layer], placement.name, DepthRecord)
            if record is not None:  # None: inside a block that kept no token
                parts.append(threshold.scores(record)[record.reached_BT])
        return torch.cat(parts) if parts else torch.empty(0)


def find_handles(model: SkipstoneForCausalLM) -> list[ThresholdHandle]:
    """Every threshold on scores in the model, outermost mechanisms first, then by block; none where nothing skips."""
    blocks: Any = model.model.layers
    handles: list[ThresholdHandle] = []
    for entry, values in zip(parse_mechanisms(model.config), model.config.mechanisms or [], strict=True):
        mechanisms = [blocks[layer].mechanisms[entry.key] for layer in entry.layers]
        thresholds = [m.score_threshold() for m in mechanisms]
        if any(t is not None and t.option is not None for t in thresholds):
            handles.append(ThresholdHandle(mechanisms, values))
        else:
            handles += [
                ThresholdHandle([m], values) for m, t in zip(mechanisms, thresholds, strict=True) if t is not None
            ]
    return handles


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
