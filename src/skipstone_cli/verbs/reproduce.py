"""`skipstone reproduce NAME`"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError


class Scale(StrEnum):
    """The names of the scales at which a study can run."""

    QUICK = "quick"
    LAPTOP = "laptop"
    PAPER = "paper"


Readme = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Also write the table into this file, between <!-- NAME:begin --> and end."),
]
Jobs = Annotated[
    int, typer.Option(metavar="N", help="Arms to run at a time, each in a process of its own, as on one GPU.")
]
Html = Annotated[
    bool, typer.Option("--html", help="Also write the page as NAME.html, with pictures of its table and claims.")
]
Ledger = Annotated[
    bool, typer.Option("--ledger", help="Write costs and claims of all records in --out into its README.md.")
]


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of a registered study; see --list.")] = None,
    scale: Annotated[Scale, typer.Option(help="Size of the models and the runs.")] = Scale.LAPTOP,
    arms: Annotated[str | None, typer.Option(metavar="ARM,ARM", help="Arms to run. Default: all.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds. Default: the study's own.")] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder for tables and records. Default: --runs.")
    ] = None,
    runs: Annotated[Path, typer.Option(metavar="DIR", help="Folder that contains the run folders.")] = Path("runs"),
    readme: Readme = None,
    render: Annotated[bool, typer.Option("--render", help="Run nothing, only render existing records.")] = False,
    html: Html = False,
    list_: Annotated[bool, typer.Option("--list", help="List the studies and exit.")] = False,
    jobs: Jobs = 1,
    ledger: Ledger = False,
) -> None:
    """Run or resume a registered study, and render its table from the records."""
    numbers = parse_seeds(seeds)
    if html and (ledger or list_):
        raise UserError(f"--html has no effect with {'--ledger' if ledger else '--list'}")
    if ledger and (name is not None or list_):
        raise UserError("--ledger covers all studies, so it takes neither a name nor --list")
    if ledger:
        from skipstone_studies.ledger import write

        typer.echo(f"ledger: {write(runs if out is None else out)}")
        return
    if name is None and not list_:
        raise UserError("name a study to reproduce; `skipstone reproduce --list` lists them")

    if name is None or list_:
        print_list()
        return

    from skipstone.core.strict import choose
    from skipstone_studies.catalogue import FILES

    choose("study", name, FILES)
    if not render:
        typer.echo("loading torch and the studies; remaining time is shown once a model trains", err=True)

    from skipstone_studies.run import reproduce as run

    named = None if arms is None else [arm.strip() for arm in arms.split(",")]
    table = run(
        name,
        scale=scale.value,
        arms=named,
        seeds=numbers,
        out=out,
        runs=runs,
        readme=readme,
        render_only=render,
        jobs=jobs,
        html=html,
    )
    typer.echo(f"table: {table}")
    if html:
        typer.echo(f"page: {table.with_suffix('.html')}")


def print_list() -> None:
    """Print all studies with their purposes."""
    from skipstone_studies.run import describe

    for name, purpose in describe().items():
        typer.echo(f"{name:<24}{purpose}")


def parse_seeds(text: str | None) -> list[int] | None:
    """Parse `0,1,2` as integers without repetition. Raises UserError otherwise."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len({*words}) < len(words):
        raise UserError(f"--seeds must be different whole numbers separated by commas, as 0,1,2; got {text!r}")
    return [int(word) for word in words]
