"""`evaluate_tasks`: score a run or a saved model on tasks of lm-evaluation-harness, deciding as in generation."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from skipstone.core.routing_module import require_causal
from skipstone.core.strict import PlainDict, PlainMapping
from skipstone.evaluate.tables import UNKNOWN, OneTable, Section, number, plain
from skipstone.model.loading import one_line
from skipstone.runs import Run


@dataclass(frozen=True, kw_only=True)
class Score:
    """One metric of one task, as lm-evaluation-harness reports it.

    value: the metric's value. error: the value's standard error. shots: number of examples in the prompt. samples:
    number of samples that were scored. error, shots and samples are None if the harness did not report them.
    """

    task: str
    metric: str
    value: float
    error: float | None
    shots: int | None
    samples: int | None


@dataclass(frozen=True, kw_only=True)
class TaskEvaluation(OneTable):
    """The scores of a run on tasks of lm-evaluation-harness, in the harness's order.

    name: the run's name. scores: one `Score` (value and standard error) per task and metric.
    """

    name: str
    scores: tuple[Score, ...]

    def to_dict(self) -> PlainDict:
        """Return plain values for JSON: "run", the run's name, and "scores", a list of dicts.

        The keys of each are "task", "metric", "value", "error" (standard error of the value), "shots" and "samples".
        """
        return plain({"run": self.name, "scores": [vars(score) for score in self.scores]})

    def section(self) -> Section:
        rows = [
            [s.task, s.metric, number(s.value), number(s.error), _count(s.shots), _count(s.samples)]
            for s in self.scores
        ]
        columns = ["task", "metric", "value", "±", "shots", "samples"]
        return Section(title=f"{self.name}: lm-evaluation-harness, decisions as generated", columns=columns, rows=rows)


def evaluate_tasks(
    run: Path, tasks: Sequence[str], *, include_path: Path | None = None, limit: int | None = None, batch_size: int = 8
) -> TaskEvaluation:
    """Score a model on tasks, groups and tags of lm-evaluation-harness.

    The model decides as in generation, without later tokens. run: a run folder or saved model with a tokenizer. tasks:
    names of tasks, groups or tags. include_path: a folder of further task definitions in YAML; the harness's own are
    read only for names that it does not define. limit: score only the first `limit` samples of each task. batch_size:
    sequences of a forward pass. Raises ValueError or FileNotFoundError for a missing package, folder or tokenizer, for
    an unknown task or one whose data cannot be fetched, and for a model that cannot decide without later tokens.
    """
    if find_spec("lm_eval") is None:
        raise ValueError("--tasks needs a package: pip install 'skipstone[eval]'")
    loaded = Run(run)
    tokenizer = loaded.load_tokenizer()
    if tokenizer is None:
        raise ValueError(f"{str(run)!r} has no tokenizer, which tasks need because they are text")
    manager = _manager(tasks, include_path)
    model: Any = loaded.load_model().to("cuda" if torch.cuda.is_available() else "cpu")  # type: ignore[arg-type]
    require_causal(model.routing_modules())

    from lm_eval import simple_evaluate

    wrapped = _harness_model()(
        pretrained=model, tokenizer=tokenizer, backend="causal", device=str(model.device), batch_size=batch_size
    )
    try:
        found = simple_evaluate(wrapped, tasks=list(tasks), task_manager=manager, limit=limit, log_samples=False)
    except ConnectionError as error:
        raise ValueError(f"the data of {', '.join(tasks)} could not be fetched: {one_line(error)}") from None
    return TaskEvaluation(name=loaded.name, scores=tuple(_scores(found)))


def _harness_model() -> Any:
    """Return lm_eval's model class, which scores a whole text after a single BOS, not after two.

    It puts BOS before a text and lets a tokenizer that adds BOS put another one there, whose probability is then scored
    as that of the text.
    """
    from lm_eval.models.huggingface import HFLM

    class HarnessModel(HFLM):  # type: ignore[misc]
        add_bos_token: bool | None

        def loglikelihood_rolling(self, *args: object, **kwargs: object) -> Any:
            before, self.add_bos_token = self.add_bos_token, False
            try:
                return super().loglikelihood_rolling(*args, **kwargs)
            finally:
                self.add_bos_token = before

    return HarnessModel


def _manager(tasks: Sequence[str], include_path: Path | None) -> Any:
    """Return a task manager of lm_eval that knows all the tasks.

    lm_eval's own tasks, which take many seconds to read, are read only if needed. Raises ValueError for an unknown
    task.
    """
    from lm_eval.tasks import TaskManager

    if include_path is not None and not include_path.is_dir():
        raise FileNotFoundError(f"folder of tasks {str(include_path)!r} does not exist")
    own = None if include_path is None else str(include_path)
    manager = TaskManager(include_path=own, include_defaults=False)
    if not set(tasks) <= set(manager.all_tasks):
        manager = TaskManager(include_path=own)
    for name in tasks:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.5)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"unknown task {name!r}{hint} (`lm_eval ls tasks` lists them)")
    return manager


def _scores(found: PlainMapping) -> Iterator[Score]:
    """Yield the scores in lm_eval's results by task, whose keys are `metric,filter` and `metric_stderr,filter`."""
    for task, figures in found["results"].items():
        for key, value in figures.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = figures.get(f"{metric}_stderr,{kind}")
            yield Score(
                task=task,
                metric=metric if kind == "none" else f"{metric} ({kind})",
                value=float(value),
                error=float(error) if isinstance(error, int | float) and math.isfinite(error) else None,
                shots=found["n-shot"].get(task),
                samples=found["n-samples"].get(task, {}).get("effective"),
            )


def _count(value: int | None) -> str:
    return UNKNOWN if value is None else f"{value:,}"
