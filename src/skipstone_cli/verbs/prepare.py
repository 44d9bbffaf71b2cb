"""`skipstone prepare SOURCE --tokenizer T --out FOLDER`: tokenise text into files for training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError

Split = Annotated[
    str | None,
    typer.Option(
        metavar="98-1-1",
        help="Per cent of documents for training, validation and test, if the source has no splits.",
    ),
]
Source = Annotated[
    str,
    typer.Argument(
        help="jsonl:PATH, hf:OWNER/NAME[/CONFIG], text:PATH or another corpus; with --check, a folder of shards."
    ),
]
ShardTokens = Annotated[
    int | None, typer.Option(min=1, help="Largest number of tokens of a shard. Default: 134,217,728.")
]


def prepare(
    source: Source,
    tokenizer: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="Tokenizer: byte, char, bpe:SIZE or pretrained:NAME_OR_PATH. Default: byte."),
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Folder to write the shards to.")] = None,
    field: Annotated[
        str | None,
        typer.Option(help="Name of the field that contains the text, in JSON objects or dataset rows. Default: text."),
    ] = None,
    split: Split = None,
    shard_tokens: ShardTokens = None,
    check: Annotated[
        bool, typer.Option("--check", help="Write nothing; verify the checksums of the shards in SOURCE.")
    ] = False,
) -> None:
    """Tokenise text into shards on disk, for training with data.corpus=shards:FOLDER; resumes an interrupted call.

    Example: skipstone prepare text:my_texts --tokenizer pretrained:gpt2 --out my_shards
    """
    given = {"--tokenizer": tokenizer, "--out": out, "--field": field, "--split": split, "--shard-tokens": shard_tokens}
    if check:
        idle = [option for option, value in given.items() if value is not None]
        if idle:
            raise UserError(f"--check writes nothing, so {idle[0]} would have no effect; give only one of them")
        _check(Path(source))
        return
    if out is None:
        raise UserError("--out is missing; name the folder for the shards")

    from skipstone.data.corpora import find_entry
    from skipstone.data.tokenizers import check_spec

    find_entry(source)
    spec = "byte" if tokenizer is None else tokenizer
    check_spec(spec)

    from skipstone.data.sharding import SHARD_TOKENS, write_shards

    manifest = write_shards(
        source,
        out,
        tokenizer=spec,
        field=field,
        split=split,
        shard_tokens=shard_tokens or SHARD_TOKENS,
        report=lambda *done: print(_line(*done), file=sys.stderr),  # typer.echo seeks, which no terminal can
    )
    for name in manifest.splits:
        typer.echo(_line(name, manifest.total(name, "documents"), manifest.total(name, "tokens")))
    typer.echo(f"shards: {out}")


def _check(folder: Path) -> None:
    from skipstone.data import shards

    for name, opened in shards.open_sources(folder).items():
        shards.check(opened.folder, opened.manifest, list(opened.manifest.splits))
        count = sum(map(len, opened.manifest.splits.values()))
        typer.echo(f"{name}: {count} shards agree with {shards.MANIFEST}")


def _line(split: str, documents: int, tokens: int) -> str:
    return f"{split}: {documents:,} documents, {tokens:,} tokens"
