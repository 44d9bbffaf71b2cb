"""`skipstone run-module MODULE ...`: run another tool's Python module with our models registered in transformers."""

from __future__ import annotations

import importlib
import runpy
import sys
import traceback
from importlib.util import find_spec
from typing import Annotated

import typer

from skipstone_cli.errors import USER_ERRORS, UserError, usual_warnings


def run_module(
    context: typer.Context,
    module: Annotated[
        str, typer.Argument(metavar="MODULE", help="Module, as for `python -m`; its own arguments follow.")
    ],
) -> None:
    """Run another tool's Python module with Skipstone's models registered in transformers' Auto classes.

    Example: skipstone run-module lm_eval run --model hf --model_args pretrained=my-model --tasks arithmetic
    """
    _require(module)
    for part in ("causal_lm", "classifier"):
        importlib.import_module(f"skipstone.model.{part}")
    usual_warnings()
    sys.argv[:] = [module, *context.args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except USER_ERRORS:  # errors of the tool, shown with their traceback as the tool itself would
        traceback.print_exc()
        raise typer.Exit(1) from None


def _require(module: str) -> None:
    """Raise UserError unless `python -m module` would find something to run.

    Parents of a dotted name are imported, as Python does. Errors of their own are shown with their traceback.
    """
    try:
        found = find_spec(module)
        is_package = found is not None and found.submodule_search_locations is not None
        runs = not is_package or find_spec(f"{module}.__main__") is not None
    except ModuleNotFoundError as error:  # a parent is absent, or is no package
        if error.name is None or not module.startswith(error.name):
            raise
        found = None
    except ValueError:  # __main__ and the like have no spec
        found = None
    if found is None:
        raise UserError(f"there is no module {module!r} to run")
    if not runs:
        raise UserError(f"module {module!r} is a package without __main__, so there is nothing to run")
