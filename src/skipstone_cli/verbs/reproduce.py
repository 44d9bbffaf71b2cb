"""`skipstone reproduce NAME`: run a study (a published experiment), and render its table."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError
from skipstone_cli.paths import places_for_folders


class Scale(StrEnum):
    """The sizes at which a study can run."""

    QUICK = "quick"
    LAPTOP = "laptop"
    PAPER = "paper"


Readme = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="Also write the table into this file, between <!-- NAME:begin --> and <!-- NAME:end -->."
    ),
]
Jobs = Annotated[
    int, typer.Option(min=1, metavar="N", help="Number of arms to run at the same time, each in its own process.")
]
Html = Annotated[bool, typer.Option("--html", help="Also write the page as NAME.html, with charts.")]
Ledger = Annotated[
    bool, typer.Option("--ledger", help="Instead summarise costs and claims of all studies in --out in its README.md.")
]
Scales = Annotated[
    Scale, typer.Option(help="Size of models and runs: laptop, paper (for GPUs), or quick where the study has it.")
]
Arms = Annotated[
    str | None,
    typer.Option(metavar="ARM,ARM", help="Run only these arms (the recipes that a study compares). Default: all."),
]
Render = Annotated[
    bool, typer.Option("--render", help="Run nothing; only render the page again from existing records.")
]
Seeds = Annotated[str | None, typer.Option(metavar="0,1,2", help="Seeds to run. Default: the study's own.")]
Out = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Folder for the table and the records. Default: as --runs.")
]
ListStudies = Annotated[bool, typer.Option("--list", help="List the studies and exit.")]
Runs = Annotated[Path, typer.Option(metavar="DIR", help="Folder that contains the run folders.")]


def reproduce(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="Name of the study; see --list.")] = None,
    scale: Scales = Scale.LAPTOP,
    arms: Arms = None,
    seeds: Seeds = None,
    out: Out = None,
    runs: Runs = Path("runs"),
    readme: Readme = None,
    render: Render = False,
    html: Html = False,
    list_: ListStudies = False,
    jobs: Jobs = 1,
    ledger: Ledger = False,
) -> None:
    """Run or resume a registered study (a published experiment), and render its table from the records.

    It trains and measures several arms, the recipes that it compares. Example: skipstone reproduce demo --scale laptop
    """
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
    places_for_folders({"--out": out, "--runs": None if render else runs})
    if not render:
        typer.echo("loading torch and the studies; remaining time is shown once a model trains", err=True)

    from skipstone_studies.run import reproduce as run

    table = run(
        name,
        scale=scale.value,
        arms=None if arms is None else [arm.strip() for arm in arms.split(",")],
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
    """Print the names of all studies with their purposes."""
    from skipstone_studies.run import describe

    for name, purpose in describe().items():
        typer.echo(f"{name:<24}{purpose}")


def parse_seeds(text: str | None) -> list[int] | None:
    """Parse text such as "0,1,2" as a list of different whole numbers of at least 0; None for None.

    Raises UserError for any other text, also for one that repeats a number.
    """
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() for word in words) or len({*words}) < len(words):
        raise UserError(f"--seeds must be different whole numbers separated by commas, as 0,1,2; got {text!r}")
    return [int(word) for word in words]
