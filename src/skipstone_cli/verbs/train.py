"""`skipstone train RECIPE.yaml key=value ...`: train a model into a run folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from skipstone_cli.arguments import Overrides, RecipeFile
from skipstone_cli.errors import UserError


def train(
    recipe: RecipeFile,
    overrides: Overrides = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write. Default: runs/NAME, by the recipe's name.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue an interrupted run from its last checkpoint.")
    ] = False,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Train nothing; print FLOPs, memory and hours on one GPU.")
    ] = False,
    gpu: Annotated[str | None, typer.Option(help="With --estimate: the GPU (A100, H100, ...). Default: H100.")] = None,
    mfu: Annotated[
        float | None,
        typer.Option(
            metavar="0.4", help="With --estimate: share of the GPU's peak FLOP/s that is reached. Default: 0.4."
        ),
    ] = None,
) -> None:
    """Train a model from a recipe into a run folder.

    The folder holds the resolved recipe, metrics, checkpoints and the trained model. For several processes, use
    `torchrun -m skipstone train RECIPE.yaml`.

    Example: skipstone train recipes/mod.yaml train.steps=500 --out runs/mine
    """
    from skipstone_cli.overrides import load_recipe
    from skipstone_cli.recipes import check_recipe

    idle = {"--gpu": gpu, "--mfu": mfu} if not estimate else {"--out": out, "--resume": resume or None}
    for option, value in idle.items():
        if value is not None:
            raise UserError(f"{option} would have no effect {'with' if estimate else 'without'} --estimate")
    config = load_recipe(recipe, overrides or [])
    check_recipe(config, overrides or [], out=out, resume=resume, writes=not estimate)
    if estimate:
        _print_estimate(config, gpu, mfu)
        return

    from skipstone.train.folder import is_first_process
    from skipstone.train.training import train as run

    folder = run(config, out=out, resume=resume)
    if is_first_process():
        typer.echo(f"run folder: {folder}")


def _print_estimate(config: dict[str, Any], gpu: str | None, mfu: float | None) -> None:
    from skipstone.train import estimate

    for line in estimate.estimate(config, gpu=gpu or "H100", mfu=estimate.MFU if mfu is None else mfu).lines():
        typer.echo(line)
