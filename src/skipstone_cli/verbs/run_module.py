"""`skipstone run-module MODULE ...`"""

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
    if find_spec(module.partition(".")[0]) is None:
        raise UserError(f"there is no module {module!r} to run")
    for part in ("causal_lm", "classifier"):
        importlib.import_module(f"skipstone.model.{part}")
    usual_warnings()
    sys.argv[:] = [module, *context.args]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except USER_ERRORS:  # errors of the tool, shown with their traceback as the tool itself would
        traceback.print_exc()
        raise typer.Exit(1) from None
