"""`skipstone view RUN [RUN2]`: open a live page that shows which blocks compute each token."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError
from skipstone_cli.paths import existing_dir, existing_run, new_path

PORT = 8737


def view(
    runs: Annotated[
        list[Path],
        typer.Argument(metavar="RUN [RUN2]", help="Folder of a run or saved model; a second one is shown beside it."),
    ],
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port on this machine; 0 takes any free one.")] = PORT,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open the page in a browser.")] = True,
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Start no server; write the page for --prompt as one HTML file.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="With --save: the prompt.")] = None,
    new_tokens: Annotated[
        int | None, typer.Option(help="With --save: number of tokens to generate. Default: 64.")
    ] = None,
) -> None:
    """Open a live page: type a prompt and watch which blocks compute each token."""
    if len(runs) > 2:
        raise UserError(f"view shows one or two models side by side, got {len(runs)}")
    for run in runs:
        existing_dir(run, "run folder")
    if save is None and (prompt is not None or new_tokens is not None):
        raise UserError("--prompt and --new-tokens belong to --save; on the live page, type them")
    if save is not None:
        if prompt is None:
            raise UserError("--save needs --prompt TEXT")
        if port != PORT or not browser:
            raise UserError("--save starts no server, so --port and --no-browser would have no effect")
        new_path(save, "--save")
        for run in runs:
            existing_run(run)

        from skipstone.view.saved_page import save_page

        typer.echo(f"written: {save_page(runs, save, prompt, new_tokens=64 if new_tokens is None else new_tokens)}")
        return
    missing = [name for name in ("starlette", "uvicorn") if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f"view needs packages ({', '.join(missing)} missing): pip install 'skipstone[view]'")
    for run in runs:
        existing_run(run)

    from skipstone.view.serving import serve

    try:
        serve(runs, port=port, browser=browser, announce=lambda address: typer.echo(f"{address}  (Ctrl-C stops)"))
    except KeyboardInterrupt:
        # Nothing is left to write, and taking down an interpreter with torch takes seconds.
        sys.stdout.flush()
        os._exit(0)
