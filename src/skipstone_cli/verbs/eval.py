"""`skipstone eval RUN`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.output import check_targets, publish
from skipstone_cli.paths import existing_dir


def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a saved model.")],
    split: Annotated[str, typer.Option(help="Split of the run's corpus.")] = "validation",
    batch_size: Annotated[int, typer.Option(min=1, help="Rows a forward pass.")] = 8,
    corpus: Annotated[str | None, typer.Option(help="Another corpus; needed for a saved model.")] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Another number of tokens a row.")] = None,
    json: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the figures here as JSON.")] = None,
) -> None:
    """Oracle, causal and executed loss on a whole split, and what the mechanisms did."""
    existing_dir(run, "run folder")
    check_targets(json=json, markdown=None)

    from skipstone.evaluate.run import evaluate as measure

    figures = measure(run, split=split, batch_size=batch_size, corpus=corpus, context=context)
    publish(figures, json=json, markdown=None)
