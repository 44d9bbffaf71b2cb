"""`skipstone prepare SOURCE --tokenizer T --out FOLDER`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError


def prepare(
    source: Annotated[
        str,
        typer.Argument(help="jsonl:PATH, hf:OWNER/NAME[/CONFIG], text:PATH or another corpus; with --check, shards."),
    ],
    tokenizer: Annotated[
        str | None, typer.Option(metavar="SPEC", help="byte, char or pretrained:NAME_OR_PATH; byte if absent.")
    ] = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="Where the shards go.")] = None,
    field: Annotated[str | None, typer.Option(help="Of a JSON object or a row: its text; 'text' if absent.")] = None,
    split: Annotated[
        str | None, typer.Option(metavar="98-1-1", help="Per cent by hash, where the source has no splits of its own.")
    ] = None,
    shard_tokens: Annotated[int | None, typer.Option(min=1, help="Tokens of a shard; 134,217,728 if absent.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Write nothing, compare the checksums of SOURCE.")] = False,
) -> None:
    """Tokenise text into shards on disk, to train from with corpus shards:FOLDER; go on where it was stopped."""
    given = {"--tokenizer": tokenizer, "--out": out, "--field": field, "--split": split, "--shard-tokens": shard_tokens}
    if check:
        idle = [option for option, value in given.items() if value is not None]
        if idle:
            raise UserError(f"--check writes nothing, so {idle[0]} would have no effect; leave one of them out")
        _check(Path(source))
        return
    if out is None:
        raise UserError("--out is missing: name the folder for the shards")

    from skipstone.data.corpora import find_entry
    from skipstone.data.tokenizers import check_spec

    find_entry(source)
    check_spec(tokenizer or "byte")

    from skipstone.data.sharding import SHARD_TOKENS, write_shards

    manifest = write_shards(
        source,
        out,
        tokenizer=tokenizer or "byte",
        field=field,
        split=split,
        shard_tokens=shard_tokens or SHARD_TOKENS,
        report=lambda *done: typer.echo(_line(*done), err=True),
    )
    for name in manifest.splits:
        typer.echo(_line(name, manifest.total(name, "documents"), manifest.total(name, "tokens")))
    typer.echo(f"shards: {out}")


def _check(folder: Path) -> None:
    from skipstone.data import shards

    for name, opened in shards.open_sources(folder).items():
        shards.check(opened.folder, opened.manifest, list(opened.manifest.splits))
        count = sum(map(len, opened.manifest.splits.values()))
        typer.echo(f"{name}: {count} shards are what {shards.MANIFEST} says")


def _line(split: str, documents: int, tokens: int) -> str:
    return f"{split}: {documents:,} documents, {tokens:,} tokens"
