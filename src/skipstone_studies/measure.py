"""Measurements of one finished run, and of all runs of a seed in one timing session."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from skipstone.core.strict import PlainDict
from skipstone.evaluate.comparison import compare
from skipstone.evaluate.evaluation import evaluate
from skipstone.generate.text_generation import stream_text
from skipstone.runs import Run
from skipstone_studies.timing import training_speeds


def standard(folder: Path) -> PlainDict:
    """Return the run's own summary (`training`) and its losses, capacities and FLOPs (`evaluation`)."""
    return {"training": Run(folder).result(), "evaluation": evaluate(folder).to_dict()}


def measure_together(runs: Mapping[str, Path]) -> dict[str, PlainDict]:
    """Return `training_speed` and `comparison` of each arm, timed interleaved.

    Machine noise then affects all arms equally.
    """
    speeds = training_speeds(runs)
    compared = compare(list(runs.values())).to_dict()["runs"]
    return {
        arm: {"training_speed": speeds[arm], "comparison": figures} for arm, figures in zip(runs, compared, strict=True)
    }


def sample(folder: Path, prompt: str, *, seed: int = 0) -> PlainDict:
    """Return generated text with the default settings of `skipstone generate`. pieces: (text, share of compute)."""
    pieces = stream_text(folder, prompt, seed=seed)
    return {"prompt": prompt, "pieces": [[piece.text, round(piece.compute, 4)] for piece in pieces]}
