"""`skipstone eval RUN`: measure losses and FLOPs of a model on a split of text, or score it on tasks."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.arguments import RunFolder
from skipstone_cli.errors import UserError
from skipstone_cli.output import check_targets, publish
from skipstone_cli.paths import existing_dir, existing_run


def evaluate(
    run: RunFolder,
    split: Annotated[
        str, typer.Option(help="Split of the corpus: validation, test or train, as far as it has them.")
    ] = "validation",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows in a forward pass.")] = 8,
    corpus: Annotated[
        str | None,
        typer.Option(help="Corpus, as data.corpus of a recipe; needed for a saved model. Default: the run's own."),
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens per row. Default: the run's own.")] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            metavar="SHARE,...",
            help="Also evaluate with thresholds set to execute these shares of the dense FLOPs, as .6,.8.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...", help="Score these tasks of lm-evaluation-harness instead of measuring losses."
        ),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="With --tasks: folder with your own task definitions in YAML.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="With --tasks: score only the first samples of each task.")
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the figures to this JSON file.")] = None,
) -> None:
    """Measure losses and FLOPs of a model on a whole split of text, or score it on tasks.

    Losses are given as routed in training (oracle: may look at later tokens), as decided from earlier tokens only
    (causal: computes all tokens and masks) and as executed (the same decisions, skipped tokens not computed), with the
    figures of each mechanism.
    """
    existing_dir(run, "run folder")
    check_targets(json=json, markdown=None)
    _check(tasks, corpus=corpus, context=context, budget=budget, include_path=include_path, limit=limit)
    budgets = _shares(budget)
    existing_run(run)
    if tasks is not None:
        from skipstone.evaluate.harness import evaluate_tasks

        names = [name.strip() for name in tasks.split(",")]
        publish(
            evaluate_tasks(run, names, include_path=include_path, limit=limit, batch_size=batch_size),
            json=json,
            markdown=None,
        )
        return

    from skipstone.evaluate.evaluation import evaluate as measure

    figures = measure(run, split=split, batch_size=batch_size, corpus=corpus, context=context, budgets=budgets)
    publish(figures, json=json, markdown=None)


def _shares(budget: str | None) -> list[float]:
    try:
        return [] if budget is None else [float(share) for share in budget.split(",")]
    except ValueError:
        raise UserError(f"--budget takes shares of the dense FLOPs, such as 0.6 or .4,.6,.8; got {budget!r}") from None


def _check(tasks: str | None, **given: object) -> None:
    """Raise UserError for an option that would have no effect."""
    idle = ("corpus", "context", "budget") if tasks is not None else ("include_path", "limit")
    for name in idle:
        if given[name] is not None:
            other = "with --tasks" if tasks is not None else "without --tasks"
            raise UserError(f"--{name.replace('_', '-')} would have no effect {other}")
