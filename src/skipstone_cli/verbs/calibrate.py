"""`skipstone calibrate RUN`: measure routing thresholds for every FLOP budget, and store them beside the weights."""

from __future__ import annotations

from typing import Annotated

import typer

from skipstone_cli.arguments import RunFolder
from skipstone_cli.errors import UserError
from skipstone_cli.output import publish
from skipstone_cli.paths import existing_dir, existing_run


def calibrate(
    run: RunFolder,
    corpus: Annotated[
        str | None,
        typer.Option(help="Corpus, as data.corpus of a recipe; needed for a saved model. Default: the run's own."),
    ] = None,
    context: Annotated[int | None, typer.Option(min=2, help="Tokens per row. Default: the run's own.")] = None,
    rows: Annotated[int, typer.Option(min=1, help="Number of training rows to measure on.")] = 32,
    kl: Annotated[
        float | None,
        typer.Option(
            help="Choose instead what reads the fewest bytes with KL(source || model) up to this, in nats a token: a "
            "budget, which is printed, and the number of head candidates, which is written to config.json."
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            help="With --kl: folder or hub name of the model to compare with. Default: RUN as trained, with its whole "
            "head."
        ),
    ] = None,
) -> None:
    """Measure the routing thresholds that meet each FLOP budget, and write them to budget.json beside the weights.

    A budget is a share of the dense model's forward FLOPs. Afterwards `skipstone generate RUN --budget .8` and
    `skipstone eval RUN --budget .6,.8` use the thresholds; nothing is trained.
    """
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
