"""`skipstone write SOURCE FOLDER`: sample text from a dense checkpoint, to adapt it on."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.output import Reporter
from skipstone_cli.paths import existing_source, new_path


def write(
    source: Annotated[str, typer.Argument(help="Folder, hub name or .gguf file of a dense checkpoint.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write; it must not exist.")],
    tokens: Annotated[
        int, typer.Option(min=1, help="Stop once all texts together have at least this many tokens.")
    ] = 300_000,
    length: Annotated[int, typer.Option(min=1, help="Largest number of tokens of a text.")] = 256,
    batch: Annotated[int, typer.Option(min=1, help="Number of texts generated at a time.")] = 64,
    start: Annotated[
        str | None,
        typer.Option(
            help="Prompt of each text, not written itself. Default: the tokenizer's token that begins a text."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sampling.")] = 0,
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the weights while generating: float32, bfloat16 or float16. Default: float32."),
    ] = None,
) -> None:
    """Sample text from a dense checkpoint at temperature 1, to adapt it on with data.corpus=text:FOLDER.

    One text in 20 goes to validation.txt, the others to train.txt. Use it if the checkpoint's training text is not
    available.
    """
    existing_source(source)
    new_path(out, "output folder")

    from skipstone.adapt.self_generated import write as write_texts

    with Reporter("tokens") as show:
        write_texts(
            source,
            out,
            tokens=tokens,
            length=length,
            batch=batch,
            start=start,
            seed=seed,
            dtype=dtype,
            report=lambda done: show(min(done, tokens), tokens),
        )
    typer.echo(f"text: {out}")
