"""`skipstone convert SOURCE OUT`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.paths import new_path


def convert(
    source: Annotated[str, typer.Argument(help="Folder or hub name of a dense checkpoint.")],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; the checkpoint's own if absent.")
    ] = None,
) -> None:
    """Turn a dense Llama, Mistral, Qwen2, Qwen3 or GPT-2 checkpoint into a Skipstone model."""
    new_path(out, "output folder")

    from skipstone.model.pretrained import convert as run

    run(source, out, dtype=dtype)
    typer.echo(f"written: {out}")
