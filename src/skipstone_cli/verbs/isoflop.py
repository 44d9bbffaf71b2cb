"""`skipstone isoflop RECIPE.yaml`: train several sizes at equal training FLOPs, and fit the best size."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from skipstone_cli.arguments import Overrides
from skipstone_cli.errors import UserError
from skipstone_cli.paths import places_for_folders

if TYPE_CHECKING:
    from skipstone_studies.isoflop.spec import GridSpec


class GridScale(StrEnum):
    """The names of the default grids of `skipstone isoflop`, each a choice of budgets, sizes and learning rates."""

    LAPTOP = "laptop"
    PAPER = "paper"


class RateRule(StrEnum):
    """How the learning rate of the base model carries over to other sizes: unchanged, or in proportion to 1 / width."""

    CONSTANT = "constant"
    INVERSE_WIDTH = "inverse_width"


Budgets = Annotated[
    str | None, typer.Option(metavar="1e12,3e12", help="Training FLOPs of a run; one comparison for each.")
]
Sizes = Annotated[str | None, typer.Option(metavar="64,128x6", help="Sizes of the model, each WIDTH or WIDTHxBLOCKS.")]
Rates = Annotated[
    str | None, typer.Option(metavar="1e-3,2e-3", help="Learning rates to try for each arm; the best is used.")
]
Rule = Annotated[
    RateRule | None,
    typer.Option(help="How the best learning rate carries over to other sizes: constant, or inverse_width."),
]
Arms = Annotated[
    str | None, typer.Option(metavar="dense,mod,random", help="Train only these arms of the recipe. Default: all.")
]
Seed = Annotated[int | None, typer.Option(help="Seed of the grid. Default: 0.")]
OptimumSeeds = Annotated[
    int | None, typer.Option(help="Number of seeds at the size nearest to each optimum. Default: 3.")
]
Repeats = Annotated[bool, typer.Option("--allow-repeats", help="Allow runs to read the corpus more than once.")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder for table, page and records. Default: as --runs.")
]
Estimate = Annotated[
    bool,
    typer.Option("--estimate", help="Train nothing; list all runs with their FLOPs and their time on this machine."),
]
Speed = Annotated[
    float | None,
    typer.Option(metavar="4e14", help="With --estimate: FLOP/s of another machine; this one is then not timed."),
]
Recipe = Annotated[
    Path,
    typer.Argument(
        metavar="RECIPE.yaml", help="Base recipe. Its arms, or dense, its mechanisms and random choice, are compared."
    ),
]
Render = Annotated[
    bool, typer.Option("--render", help="Train nothing; only render table and page again from existing records.")
]


def isoflop(
    recipe: Recipe,
    overrides: Overrides = None,
    scale: Annotated[
        GridScale, typer.Option(help="Which default values of budgets, sizes and rates to use.")
    ] = GridScale.LAPTOP,
    budgets: Budgets = None,
    sizes: Sizes = None,
    rates: Rates = None,
    rate_rule: Rule = None,
    arms: Arms = None,
    seed: Seed = None,
    optimum_seeds: OptimumSeeds = None,
    allow_repeats: Repeats = False,
    out: Out = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder that contains the run folders.")] = Path("runs"),
    estimate: Estimate = False,
    flops_per_second: Speed = None,
    render: Render = False,
) -> None:
    """Train several sizes of models at equal training FLOPs, fit the best size of each arm, and write the results.

    An arm is one of the recipes that are compared, such as dense and routed. Writes a table, a page and one record for
    each run, and resumes what was interrupted.

    Example: skipstone isoflop recipes/isoflop.yaml --estimate
    """
    given = {
        "budgets": _numbers("--budgets", budgets),
        "sizes": _words("--sizes", sizes),
        "rates": _numbers("--rates", rates),
        "rate_rule": None if rate_rule is None else rate_rule.value,
        "arms": _words("--arms", arms),
        "seed": seed,
        "optimum_seeds": optimum_seeds,
        "allow_repeats": allow_repeats or None,
    }
    if flops_per_second is not None and not estimate:
        raise UserError("--flops-per-second would have no effect without --estimate")
    if flops_per_second is not None and not 0 < flops_per_second < float("inf"):
        raise UserError(f"--flops-per-second must be above 0, got {flops_per_second:g}")
    if estimate and render:
        raise UserError("--estimate and --render exclude each other; give only one of them")
    spec = _checked(recipe, overrides or [], given, scale)

    target = runs if out is None else out
    if not estimate:
        places_for_folders({"--out": out, "--runs": runs})

    from skipstone_studies.isoflop import run

    if estimate:
        run.estimate(spec, flops_per_second)
        return
    command = _command(recipe, overrides or [], given, scale)
    written = run.render(target, spec.name) if render else run.isoflop(spec, out=target, runs=runs, command=command)
    for path in written:
        typer.echo(f"written: {path}")


def _checked(recipe: Path, overrides: list[str], given: Mapping[str, object], scale: GridScale) -> GridSpec:
    """Return the specification of the grid. Raises UserError with all mistakes, without loading torch."""
    from skipstone_cli.overrides import load_recipe
    from skipstone_cli.recipes import told_as_typed
    from skipstone_studies.isoflop.spec import checked_spec

    config = load_recipe(recipe, overrides)
    with told_as_typed(overrides):
        return checked_spec(config, scale=scale.value, **given)


def _command(recipe: Path, overrides: list[str], given: Mapping[str, object], scale: GridScale) -> str:
    """Return the command as it would be typed, without output folders."""
    words = ["skipstone", "isoflop", str(recipe), *overrides, *_options(given)]
    return " ".join(words if scale is GridScale.LAPTOP else [*words, f"--scale={scale.value}"])


def _options(given: Mapping[str, object]) -> list[str]:
    """Return the options as they would be typed, without output folders."""
    found = []
    for name, value in given.items():
        if value is not None:
            text = ",".join(map(_short, value)) if isinstance(value, list) else _short(value)
            found += [f"--{name.replace('_', '-')}" + ("" if value is True else f"={text}")]
    return found


def _short(value: object) -> str:
    return f"{value:g}".replace("e+", "e") if isinstance(value, float) else str(value)


def _words(option: str, text: str | None) -> list[str] | None:
    """Parse `a,b` as a list without repetition. Raises UserError otherwise."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(words) or len({*words}) < len(words):
        raise UserError(f"{option} must be different values separated by commas, got {text!r}")
    return words


def _numbers(option: str, text: str | None) -> list[float] | None:
    """Parse numbers separated by commas, without repetition. Raises UserError otherwise."""
    words = _words(option, text)
    try:
        return None if words is None else [float(word) for word in words]
    except ValueError:
        raise UserError(f"{option} must be numbers separated by commas, got {text!r}") from None
