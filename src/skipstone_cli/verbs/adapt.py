"""`skipstone adapt SOURCE RECIPE.yaml key=value ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.paths import existing_source


def adapt(
    source: Annotated[str, typer.Argument(help="Folder, hub name or .gguf file of a dense checkpoint.")],
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe of the adaptation.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="key=value", help="Override a key of the recipe; the last override of a key wins."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Run folder to write. Default: the recipe's own.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue from the run folder's last checkpoint.")] = False,
) -> None:
    """Adapt a dense checkpoint so that it computes less, starting from exactly its own outputs."""
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
