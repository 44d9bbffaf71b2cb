"""The `skipstone` command as a table of verbs. This module and its imports must stay light (tests/cli check this)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated

import typer

from skipstone.core import progress_bar
from skipstone_cli.errors import one_line_errors
from skipstone_cli.verbs.adapt import adapt
from skipstone_cli.verbs.calibrate import calibrate
from skipstone_cli.verbs.compare import compare
from skipstone_cli.verbs.convert import convert
from skipstone_cli.verbs.draft_head import draft_head
from skipstone_cli.verbs.eval import evaluate
from skipstone_cli.verbs.generate import generate
from skipstone_cli.verbs.isoflop import isoflop
from skipstone_cli.verbs.plan import plan
from skipstone_cli.verbs.prepare import prepare
from skipstone_cli.verbs.quantise import quantise
from skipstone_cli.verbs.report import report
from skipstone_cli.verbs.reproduce import reproduce
from skipstone_cli.verbs.run_module import run_module
from skipstone_cli.verbs.trace import trace
from skipstone_cli.verbs.train import train
from skipstone_cli.verbs.view import view
from skipstone_cli.verbs.write import write

VERBS: dict[str, Callable[..., None]] = {
    "prepare": prepare,
    "train": train,
    "plan": plan,
    "eval": evaluate,
    "compare": compare,
    "calibrate": calibrate,
    "draft-head": draft_head,
    "generate": generate,
    "convert": convert,
    "quantise": quantise,
    "write": write,
    "adapt": adapt,
    "reproduce": reproduce,
    "isoflop": isoflop,
    "report": report,
    "trace": trace,
    "view": view,
    "run-module": run_module,
}

# Plain help without rich markup: mistyped options give only a few lines, and the command starts faster.
app = typer.Typer(
    name="skipstone",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from skipstone import __version__

        typer.echo(f"skipstone {__version__}")
        raise typer.Exit


@app.callback()
def skipstone(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Conditional computation for transformers that really saves the computation.

    Every verb is a subcommand; `skipstone VERB --help` describes it.
    """


# Everything after the module's name is passed to the module, including --help.
PASSED_ON = {"allow_extra_args": True, "ignore_unknown_options": True, "allow_interspersed_args": False}

for _name, _verb in VERBS.items():
    _line = (_verb.__doc__ or "").strip().partition("\n")[0]  # whole: without it, the list of verbs cuts lines
    app.command(_name, short_help=_line, context_settings=PASSED_ON if _verb is run_module else None)(_verb)


def main() -> None:
    """Run the command; the entry point of the console script and of `python -m skipstone`."""
    progress_bar.show()
    with one_line_errors():
        app(prog_name="skipstone")


if __name__ == "__main__":
    main()
