"""`skipstone calibrate RUN`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.output import publish
from skipstone_cli.paths import existing_dir, existing_run


def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a saved model.")],
    corpus: Annotated[
        str | None, typer.Option(help="Corpus; needed for a saved model. Default: the run's own.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens per row. Default: the run's own.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of training rows to calibrate on.")] = 32,
) -> None:
    """Write budget.json beside the weights, with the thresholds for every budget that the model can execute."""
    existing_dir(run, "run folder")

    existing_run(run)

    from skipstone.evaluate.budget_curve import calibrate_run

    publish(calibrate_run(run, corpus=corpus, context=context, rows=rows), json=None, markdown=None)
