"""`skipstone compare RUN...`: measure several runs and print their figures in one table."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.output import check_targets, publish
from skipstone_cli.paths import existing_dir, existing_run


def compare(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of training runs or saved models.")],
    dense: Annotated[
        Path | None,
        typer.Option(
            metavar="RUN", help="For runs on Reset-S3: a dense run that executes as many FLOPs; needs --forced."
        ),
    ] = None,
    forced: Annotated[
        Path | None,
        typer.Option(metavar="RUN", help="For runs on Reset-S3: a run routed by the known difficulty; needs --dense."),
    ] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Also write the figures to this JSON file.")] = None,
    markdown: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write the table to this Markdown file.")
    ] = None,
) -> None:
    """Compare runs in one table: loss, executed FLOPs, shares of tokens that blocks compute, speed, memory and energy.

    All runs are measured on this machine, and timed in turns. On the synthetic task Reset-S3, --dense and --forced name
    two reference runs, between whose accuracies each run is placed.
    """
    for run in [*runs, *(twin for twin in (dense, forced) if twin is not None)]:
        existing_dir(run, "run folder")
    check_targets(json=json, markdown=markdown)

    for run in runs:
        existing_run(run)

    from skipstone.evaluate.comparison import compare as measure

    publish(measure(runs, dense=dense, forced=forced), json=json, markdown=markdown)
