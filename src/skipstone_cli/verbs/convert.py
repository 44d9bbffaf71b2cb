"""`skipstone convert SOURCE OUT`: convert a checkpoint to a Skipstone model, or a model to another form."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError
from skipstone_cli.paths import existing_source, new_path

CALIBRATED = ("hardened", "pruned")
ToLayout = Annotated[
    str | None,
    typer.Option(
        "--to",
        help="Write a run or saved model in another form: dense (mechanisms removed, for transformers without "
        "Skipstone), hardened (each PolyGLU neuron keeps its strongest activation, no router), pruned (neuron "
        "groups that are never used removed) or polychromatic (the layout released with the paper).",
    ),
]


def convert(
    source: Annotated[
        str,
        typer.Argument(
            help="Folder or hub name of a dense checkpoint; with --from: a weight file; with --to: a run or a saved "
            "model."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write (a file with --to polychromatic); it must not exist.")],
    dtype: Annotated[
        str | None,
        typer.Option(help="Dtype of the written weights: float32, bfloat16 or float16. Default: as in SOURCE."),
    ] = None,
    from_layout: Annotated[
        str | None,
        typer.Option("--from", help="Read weights as released with a paper: tsa or polychromatic."),
    ] = None,
    to_layout: ToLayout = None,
    num_heads: Annotated[
        int | None,
        typer.Option(help="With --from tsa: number of attention heads, which the weights do not show."),
    ] = None,
    tau: Annotated[
        float | None,
        typer.Option(help="With --from polychromatic: temperature of the activation mix. Default: the file's, or .1."),
    ] = None,
    corpus: Annotated[
        str | None, typer.Option(help="With --to hardened or pruned: corpus to measure on. Default: the run's own.")
    ] = None,
) -> None:
    """Convert a dense checkpoint (Llama, Qwen3, Gemma 3, GPT-2, ...) or a paper's weights to a Skipstone model.

    With --to, a run or saved model is written in another form instead.
    """
    if from_layout is not None and to_layout is not None:
        raise UserError("--from reads released weights and --to writes them; give one of the two")
    for option, value in (("--num-heads", num_heads), ("--tau", tau)):
        if value is not None and from_layout is None:
            raise UserError(f"{option} has no effect without --from")
    if corpus is not None and to_layout not in CALIBRATED:
        raise UserError("--corpus has no effect without --to hardened or --to pruned")
    existing_source(source)
    new_path(out, "output folder" if to_layout in (None, "dense", *CALIBRATED) else "output file")

    if from_layout is not None:
        from skipstone.model.released.convert import convert_from

        convert_from(source, out, from_layout, dtype, num_heads=num_heads, tau=tau)
    elif to_layout is not None:
        _write(source, out, to_layout, dtype, corpus)
    else:
        from skipstone.model.pretrained import convert as run

        run(source, out, dtype=dtype)
    typer.echo(f"written: {out}")


def _write(source: str, out: Path, form: str, dtype: str | None, corpus: str | None) -> None:
    if form == "dense":
        from skipstone.adapt.export import export_dense

        export_dense(source, out, dtype)
    elif form == "hardened":
        from skipstone.adapt.harden import export_hardened

        export_hardened(source, out, dtype, corpus)
    elif form == "pruned":
        from skipstone.adapt.prune import export_pruned

        export_pruned(source, out, dtype, corpus)
    elif form == "polychromatic":
        from skipstone.model.released.convert import convert_to

        convert_to(source, out, form, dtype)
    else:
        from skipstone.core.strict import unknown

        raise UserError(unknown("--to", form, ["dense", *CALIBRATED, "polychromatic"]))
