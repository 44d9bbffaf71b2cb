"""`skipstone trace RUN --text FILE --out FILE`: write what each block decided for each token of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.arguments import RunFolder
from skipstone_cli.output import Reporter
from skipstone_cli.paths import existing_dir, existing_file, existing_run, new_path


def trace(
    run: RunFolder,
    text: Annotated[Path, typer.Option(metavar="FILE", help="Text to trace, a file in UTF-8.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Table to write: .parquet, .csv or .jsonl.")],
    context: Annotated[int | None, typer.Option(min=1, help="Tokens per row. Default: the model's maximum.")] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Read only the first tokens of the text. Default: all.")
    ] = None,
) -> None:
    """Write what each block decided for each token of a text, and the loss of each prediction, as a table.

    Columns: row, position, token, layer, mechanism, score (of the router), weight (factor of the block's update), kept
    (whether the token gets this update), loss (in nats), routing (causal, or oracle if decisions see the whole row).
    """
    existing_dir(run, "run folder")
    existing_file(text, "--text")
    new_path(out, "--out")

    existing_run(run)

    from skipstone.evaluate.trace_file import write_trace

    with Reporter("tokens") as report:
        lines = write_trace(run, text, out, context=context, limit=limit, report=report)
    typer.echo(f"written: {out}, {lines:,} lines")
