"""`skipstone adapt SOURCE RECIPE.yaml key=value ...`: adapt a dense checkpoint so that it computes less."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.arguments import Overrides
from skipstone_cli.paths import existing_source


def adapt(
    source: Annotated[str, typer.Argument(help="Folder, hub name or .gguf file of a dense checkpoint.")],
    recipe: Annotated[
        Path,
        typer.Argument(metavar="RECIPE.yaml", help="YAML file that describes mechanisms, budget, data and training."),
    ],
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: runs/NAME, by the recipe's name.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")
    ] = False,
) -> None:
    """Adapt a dense checkpoint so that it computes less; before training, it gives the same outputs as the checkpoint.

    The recipe names the mechanisms (which tokens skip which blocks, or which neurons are off) and a budget of FLOPs.
    Writes a run folder, as `skipstone train` does.

    Example: skipstone adapt HuggingFaceTB/SmolLM2-135M recipes/adapt-neurons.yaml data.corpus=text:FOLDER
    """
    from skipstone_cli.overrides import load_recipe
    from skipstone_cli.recipes import check_recipe

    config = load_recipe(recipe, overrides or [])

    from skipstone.adapt.adapt_recipe import read_recipe

    check_recipe(
        config, overrides or [], out=out, resume=resume, read=read_recipe, model_checker="skipstone.adapt.student"
    )
    existing_source(source)

    from skipstone.adapt.adaptation import adapt as run
    from skipstone.train.folder import is_first_process

    folder = run(source, config, out=out, resume=resume)
    if is_first_process():
        typer.echo(f"run folder: {folder}")
