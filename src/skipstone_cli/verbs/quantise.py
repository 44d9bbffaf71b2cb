"""`skipstone quantise SOURCE OUT`: store a model's weights in 16, 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.arguments import CacheBits, check_cache_bits
from skipstone_cli.errors import UserError
from skipstone_cli.paths import existing_source, new_path


def quantise(
    source: Annotated[
        str, typer.Argument(help="Folder of a run, saved model or dense checkpoint, its hub name, or a .gguf file.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    bits: Annotated[
        int,
        typer.Option(
            help="8; or 16 for bf16 or fp16, in which checkpoints of these dtypes lose nothing; or 4 for the matrices "
            "of attention and MLP, where four-bit blocks of a .gguf file are kept as they are."
        ),
    ] = 8,
    cache_bits: CacheBits = None,
    head_candidates: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of tokens whose exact logits a decoding step computes; a 4-bit preview of the head chooses "
            "them. Default: all.",
        ),
    ] = None,
    head_directions: Annotated[
        int | None,
        typer.Option(
            min=64,
            help="With --head-candidates: directions of the hidden states that the preview uses, a multiple of 64. "
            "Default: 256, or fewer in a narrower model.",
        ),
    ] = None,
    head_text: Annotated[
        Path | None,
        typer.Option(
            help="With --head-candidates: text file to fit the preview on, similar to what will be decoded. Default: "
            "the model generates text.",
        ),
    ] = None,
) -> None:
    """Store a model's weights in int8, in 16 bits or mostly in four: smaller than fp32, and faster to decode with.

    Decoding on a CPU reads them as they are stored. With --head-candidates, its steps also compute exact logits for the
    most promising tokens only.
    """
    if bits not in (16, 8, 4):
        raise UserError(f"--bits must be 16, 8 or 4, got {bits}")
    check_cache_bits(cache_bits)
    existing_source(source)
    new_path(out, "output folder")
    if head_candidates is None and (head_directions is not None or head_text is not None):
        raise UserError("--head-directions and --head-text need --head-candidates")
    if head_text is not None and not head_text.is_file():
        raise UserError(f"--head-text {str(head_text)!r} is not a file")

    from skipstone.adapt.export_quantised import HeadCandidates, export_quantised

    head = None
    if head_candidates is not None:
        head = HeadCandidates(candidates=head_candidates, directions=head_directions, text=head_text)
    typer.echo(export_quantised(source, out, head, bits, cache_bits))
    typer.echo(f"written: {out}")
