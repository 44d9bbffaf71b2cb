"""Measurements of run folders and saved models: quality, cost and speed.

evaluation.py    `evaluate`: losses, accuracy, mechanisms and FLOPs of one run
budget_curve.py  FLOPs and loss of one model at several budgets; `calibrate_run` measures its budget table
kl_budget.py     `kl_run`: the cheapest settings of a model that stays within a KL divergence
comparison.py    `compare`: runs side by side
metrics.py       the figures that `compare` measures, and their format
harness.py       `evaluate_tasks`: lm-evaluation-harness on one run
trace_file.py    `write_trace`: the depth map of a text as a parquet, CSV or JSONL file
loaded_run.py    `load_run`: a run or a saved model, ready to be measured
tables.py        sections as rich tables and Markdown
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from skipstone.evaluate.budget_curve import calibrate_run
    from skipstone.evaluate.comparison import compare
    from skipstone.evaluate.evaluation import evaluate
    from skipstone.evaluate.harness import evaluate_tasks
    from skipstone.evaluate.loaded_run import load_run
    from skipstone.evaluate.trace_file import write_trace

__all__ = ["calibrate_run", "compare", "evaluate", "evaluate_tasks", "load_run", "write_trace"]

_HOMES = {
    "calibrate_run": "budget_curve",
    "compare": "comparison",
    "evaluate": "evaluation",
    "evaluate_tasks": "harness",
    "load_run": "loaded_run",
    "write_trace": "trace_file",
}


def __getattr__(name: str) -> object:
    """Import a function of this package on first use, because writing a table needs no torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'skipstone.evaluate' has no attribute {name!r}")
    return getattr(import_module(f"skipstone.evaluate.{_HOMES[name]}"), name)
