"""`skipstone report RUN...`: write an HTML report about runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.paths import existing_dir, existing_file, existing_run, new_path


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of the training runs to show.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="HTML file to write.")] = Path("report.html"),
    evaluation: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE", help="File written by `skipstone eval RUN --budget ... --json FILE`; may be repeated."
        ),
    ] = None,
    trace: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="File written by `skipstone trace`; may be repeated.")
    ] = None,
) -> None:
    """Write a self-contained HTML report about runs: losses, decisions by token and block, speed, configuration."""
    for run in runs:
        existing_dir(run, "run folder")
    for file in evaluation or []:
        existing_file(file, "--evaluation")
    for file in trace or []:
        existing_file(file, "--trace")
    new_path(out, "--out")

    for run in runs:
        existing_run(run)

    from skipstone.report.rendering import write_report

    write_report(runs, out, evaluations=evaluation or [], traces=trace or [])
    typer.echo(f"written: {out}")
