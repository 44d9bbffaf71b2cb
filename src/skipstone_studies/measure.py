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
    """Return the usual figures of a finished run: its own summary, and its evaluation.

    folder: of the run. training: result.json. evaluation: losses, capacities and FLOPs, as `skipstone eval` measures
    them.
    """
    return {"training": Run(folder).result(), "evaluation": evaluate(folder).to_dict()}


def measure_together(runs: Mapping[str, Path]) -> dict[str, PlainDict]:
    """Return figures that compare the arms of one seed, timed in turns so that noise of the machine affects all alike.

    runs: the run folder of each arm. training_speed: see `timing.training_speeds`. comparison: figures of `skipstone
    compare`.
    """
    speeds = training_speeds(runs)
    compared = compare(list(runs.values())).to_dict()["runs"]
    return {
        arm: {"training_speed": speeds[arm], "comparison": figures} for arm, figures in zip(runs, compared, strict=True)
    }


def sample(folder: Path, prompt: str, *, seed: int = 0) -> PlainDict:
    """Return text that a run's model generates with the default settings of `skipstone generate`.

    folder: of the run. prompt: the beginning. seed: of sampling. Returns {"prompt", "pieces"}, where pieces are pairs
    of a piece of text and its share of the dense model's compute.
    """
    pieces = stream_text(folder, prompt, seed=seed)
    return {"prompt": prompt, "pieces": [[piece.text, round(piece.compute, 4)] for piece in pieces]}
