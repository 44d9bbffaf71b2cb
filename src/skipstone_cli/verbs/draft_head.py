"""`skipstone draft-head RUN`: train a block that guesses the next tokens, for speculative decoding."""

from __future__ import annotations

from typing import Annotated

import typer

from skipstone_cli.arguments import RunFolder
from skipstone_cli.errors import UserError
from skipstone_cli.output import publish
from skipstone_cli.paths import existing_dir, existing_run


def draft_head(
    run: RunFolder,
    corpus: Annotated[
        str | None,
        typer.Option(
            help="Corpus, as data.corpus of a recipe. Default: the run's own, or text that a saved model writes."
        ),
    ] = None,
    context: Annotated[int | None, typer.Option(min=5, help="Tokens per row. Default: 128, or the run's own.")] = None,
    minutes: Annotated[float | None, typer.Option(help="How long to train. Default: 10.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of eight rows, in place of --minutes.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="Seed of the rows and of the initial weights.")] = 0,
) -> None:
    """Train a block that guesses the next tokens, for `generate --draft head`, and write it beside the weights.

    The model itself is not changed, and neither is its text: the guesses only let it write several tokens in a pass.

    Example: skipstone draft-head runs/mine --minutes 5
    """
    if minutes is not None and steps is not None:
        raise UserError("--minutes and --steps both say how long to train; give only one of them")
    if minutes is not None and not 0 < minutes < float("inf"):
        raise UserError(f"--minutes must be above 0, got {minutes:g}")
    existing_dir(run, "run folder")

    existing_run(run)

    from skipstone.adapt.draft_head_run import draft_head_run

    found = draft_head_run(run, corpus=corpus, context=context, steps=steps, minutes=minutes or 10.0, seed=seed)
    publish(found, json=None, markdown=None)
