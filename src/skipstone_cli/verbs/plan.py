"""`skipstone plan RECIPE.yaml --gpus 64 --gpu H100`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE.yaml", help="The recipe to plan.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="key=value", help="Change a key of the recipe; the last one wins.")
    ] = None,
    gpus: Annotated[int, typer.Option(min=1, metavar="N", help="How many GPUs train together.")] = 8,
    gpu: Annotated[str, typer.Option(help="A100, H100, ...")] = "H100",
    mfu: Annotated[float, typer.Option(metavar="0.4", help="The share of its peak FLOP/s that is reached.")] = 0.4,
    network: Annotated[float, typer.Option(metavar="GB/s", help="Bandwidth of each GPU between nodes.")] = 50.0,
) -> None:
    """Print memory, messages, FLOPs and hours of a training on many GPUs; nothing is trained."""
    from skipstone_cli.overrides import load_recipe

    config = load_recipe(recipe, overrides or [])

    from skipstone.train.plan import plan as planned

    for line in planned(config, gpus, gpu, mfu, network).lines():
        typer.echo(line)
