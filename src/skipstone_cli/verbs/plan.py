"""`skipstone plan RECIPE.yaml --gpus 64 --gpu H100`: print what a training on many GPUs would take."""

from __future__ import annotations

from typing import Annotated

import typer

from skipstone_cli.arguments import Overrides, RecipeFile


def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    gpus: Annotated[
        int, typer.Option(min=1, metavar="N", help="Number of GPUs that train together, in nodes of 8.")
    ] = 8,
    gpu: Annotated[str, typer.Option(help="Kind of GPU: A100, H100, ...")] = "H100",
    mfu: Annotated[float, typer.Option(metavar="0.4", help="Share of the GPU's peak FLOP/s that is reached.")] = 0.4,
    network: Annotated[float, typer.Option(metavar="GB/s", help="Bandwidth between nodes for each GPU.")] = 50.0,
) -> None:
    """Print memory, communication, FLOPs and hours of a training on many GPUs; nothing is trained.

    Example: skipstone plan recipes/mod.yaml --gpus 64 --gpu H100
    """
    from skipstone_cli.overrides import load_recipe

    config = load_recipe(recipe, overrides or [])

    from skipstone.train.plan import plan as planned

    for line in planned(config, gpus, gpu, mfu, network).lines():
        typer.echo(line)
