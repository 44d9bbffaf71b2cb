"""Decisions: rules that turn scores into kept tokens, one class each, and a table of them.

An oracle decision may look at the whole row (training); a causal one can be made while generating.
"""

from __future__ import annotations

from skipstone.core.strict import choose
from skipstone.mechanisms.decisions.base import Decision
from skipstone.mechanisms.decisions.boundary import Boundaries, Boundary
from skipstone.mechanisms.decisions.controls import Forced, Positional, Random
from skipstone.mechanisms.decisions.learned import Predictor, Threshold, ThresholdP, TopK
from skipstone.mechanisms.decisions.running import EmaThreshold
from skipstone.mechanisms.schedules import Capacity

DECISIONS: dict[str, type[Decision]] = {
    "topk": TopK,
    "threshold": Threshold,
    "predictor": Predictor,
    "ema_threshold": EmaThreshold,
    "threshold_p": ThresholdP,
    "random": Random,
    "positional": Positional,
    "boundary": Boundary,
    "forced": Forced,
}

__all__ = [
    "DECISIONS",
    "Boundaries",
    "Boundary",
    "Decision",
    "EmaThreshold",
    "Forced",
    "build_decision",
    "causal_decisions",
]


def causal_decisions() -> list[str]:
    """Return the names of the decisions that need no later tokens, so that generation can make them.

    The decision "forced", which the caller makes, is left out.
    """
    return [name for name, kind in DECISIONS.items() if kind.is_causal and kind is not Forced]


Decision.causal_names.extend(causal_decisions())


def build_decision(
    name: str,
    capacity: Capacity | float,
    width: int,
    seed: int = 0,
    threshold: float = 0.5,
    norm: bool = False,
    noise_key: int = 0,
    boundary: Boundaries | None = None,
) -> Decision:
    """Build a decision, a rule that turns router scores into kept tokens, by its name in `DECISIONS`.

    capacity: share of tokens to keep, in (0, 1], or a `Capacity`, which changes during training. width: size of a
    hidden state, for "predictor". seed: the seed of the fixed patterns of "random" and "boundary". threshold: the
    probability p of "threshold_p", which keeps tokens with sigmoid(score) > p. norm: whether "predictor" normalises its
    input. noise_key: separates the random draws of "random" from those of other modules. boundary: the options of
    "boundary"; None means its defaults. Raises ValueError for an unknown name.
    """
    kind = choose("decision", name, DECISIONS)
    more = {"boundary": boundary} if issubclass(kind, Boundary) else {}
    return kind(capacity, width, seed=seed, threshold=threshold, norm=norm, noise_key=noise_key, **more)
