"""`skipstone calibrate RUN`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError
from skipstone_cli.output import publish
from skipstone_cli.paths import existing_dir, existing_run


def calibrate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder, or the folder of a saved model.")],
    corpus: Annotated[
        str | None, typer.Option(help="Corpus; needed for a saved model. Default: the run's own.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens per row. Default: the run's own.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of training rows to calibrate on.")] = 32,
    kl: Annotated[
        float | None, typer.Option(help="Choose what reads the least within this KL to the source, in nats a token.")
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="What --kl compares with. Default: the model as trained, with its whole head.")
    ] = None,
) -> None:
    """Write budget.json beside the weights, with the thresholds for every budget that the model can execute."""
    existing_dir(run, "run folder")

    existing_run(run)

    if kl is not None:
        from skipstone.evaluate.kl_budget import kl_run

        publish(kl_run(run, kl, source=source, corpus=corpus, context=context, rows=rows), json=None, markdown=None)
        return
    if source is not None:
        raise UserError("--source has no effect without --kl")

    from skipstone.evaluate.budget_curve import calibrate_run

    publish(calibrate_run(run, corpus=corpus, context=context, rows=rows), json=None, markdown=None)
