"""Threshold handles: one interface to the thresholds that decide which tokens are kept, for all mechanisms.

A token is kept if its score is above the threshold. The score is that of the records (decisions that a pass returns),
so that a calibration reads it from ordinary passes: a router's logit, or the logit of a gate's factor on the update.

Shape letters: B rows, T tokens, N tokens that reached a block.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from skipstone.core.depth import DepthModule
from skipstone.core.records import DepthRecord, Records, find
from skipstone.core.routing_module import require_causal
from skipstone.core.threshold import ScoreThreshold, State
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.wrapped import require_ours


class ThresholdHandle:
    """A threshold that calibration can set: one block's, or one shared by all blocks of a mechanism.

    It is shared if it is a configuration option of the mechanism. name: block numbers and name of the mechanism, such
    as "3 mod". model: the model that has it. index: the mechanism's index in `config.mechanisms`. mechanisms: the
    mechanism's modules in all blocks concerned.
    """

    def __init__(self, model: SkipstoneForCausalLM, index: int, mechanisms: Sequence[DepthModule]) -> None:
        placements = [m.placement for m in mechanisms]
        self.name = f"{_blocks([p.layer for p in placements])} {placements[0].name}"
        self._model, self._index, self._placements = model, index, placements
        self._thresholds: list[ScoreThreshold] = [t for m in mechanisms if (t := m.score_threshold()) is not None]
        self._option = self._thresholds[0].option

    @property
    def saved(self) -> bool:
        """Whether a threshold that `set` has changed is stored when the model is saved."""
        return self._thresholds[0].saved

    @property
    def threshold(self) -> float:
        """The score above which a token is kept."""
        return self._thresholds[0].get()

    def set(self, threshold: float) -> None:
        """Set the threshold in all its blocks and, if it is a configuration option, in the model's configuration."""
        self._thresholds[0].set(threshold)
        if self._option is not None:  # of which all blocks read one object
            self._model.change_mechanism(self._index, **{self._option: self._thresholds[0].state()[0]})

    def state(self) -> State:
        """Return everything that `set` changes as a list, so that `restore` can undo it exactly.

        It holds numbers, and None where a configuration option is not set.
        """
        state = self._thresholds[0].state()
        return state if self._option is None else [*state, self._written]

    def restore(self, state: State) -> None:
        """Set the threshold back to what it was when the method `state` returned the list `state`."""
        if self._option is None:
            self._thresholds[0].restore(state)
        else:
            self._model.change_mechanism(self._index, **{self._option: state[-1]})

    @property
    def _written(self) -> float | None:
        """The option as config.json keeps it; None where it takes its default."""
        assert self._option is not None
        value = self._model.config.mechanism_entries[self._index].get(self._option)
        assert value is None or isinstance(value, float | int)
        return value

    def scores(self, records: Sequence[Records]) -> Tensor:
        """Return the scores of a pass that this threshold decides on, fp32 [N], or fp64 for early exit.

        A token has one score for each block of this threshold that it reached. Scores are in the order of blocks, then
        of rows and tokens. records: the decisions of the pass, a dict by mechanism name for each block.
        """
        parts = []
        for placement, threshold in zip(self._placements, self._thresholds, strict=True):
            record = find(records[placement.layer], placement.name, DepthRecord)
            if record is not None:  # None: inside a block that kept no token
                parts.append(threshold.scores(record)[record.reached_BT])
        return torch.cat(parts) if parts else torch.empty(0)


def find_handles(model: SkipstoneForCausalLM) -> list[ThresholdHandle]:
    """Return a handle for every threshold on router scores (tokens above it are kept) in a model.

    A handle reads and sets its threshold. Handles are in the order of `config.mechanisms` (outermost first), then of
    blocks; the list is empty if no score decides.
    """
    handles: list[ThresholdHandle] = []
    for index, entry in enumerate(model.config.mechanism_entries):
        mechanisms = [model.decoder.layers[layer].mechanisms[entry.key] for layer in entry.homes]
        thresholds = [m.score_threshold() for m in mechanisms]
        if any(t is not None and t.option is not None for t in thresholds):
            handles.append(ThresholdHandle(model, index, mechanisms))
        else:
            handles += [
                ThresholdHandle(model, index, [m]) for m, t in zip(mechanisms, thresholds, strict=True) if t is not None
            ]
    return handles


def require_handles(model: SkipstoneForCausalLM) -> list[ThresholdHandle]:
    """Return a handle for every threshold on router scores (tokens above it are kept) in a model, at least one.

    A handle reads and sets its threshold. Handles are in the order of `config.mechanisms` (outermost first), then of
    blocks. Raises ValueError if there is none, naming the model's mechanisms, if decisions need later tokens, and if
    the model is not a Skipstone model.
    """
    require_ours(model)
    require_causal(model.routing_modules())
    handles = find_handles(model)
    if not handles:
        raise ValueError(
            "a budget sets thresholds on scores: those of mixture_of_depths, segment, token_selective and gate_skip "
            "with decision ema_threshold, threshold or threshold_p, of token_selective and early_exit executed hard, "
            "and of dynamic_chunking; "
            f"this model has {_described(model)}"
        )
    return handles


def _described(model: SkipstoneForCausalLM) -> str:
    found = []
    for entry in model.config.mechanism_entries:
        told = {key: entry[key] for key in ("decision", "capacity", "execution") if key in entry}
        found.append(entry.kind + "".join(f", {key} {value!r}" for key, value in told.items()))
    return "; ".join(found) or "no mechanism"


def _blocks(layers: Sequence[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}..{layers[-1]}"
