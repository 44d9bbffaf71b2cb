"""The command-line arguments that several verbs share, so that their names and help texts are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from skipstone_cli.errors import UserError

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="YAML file that describes model, data and training.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value", help="Replace a value of the recipe, as train.steps=500; the last one of a key wins."
    ),
]
CacheBits = Annotated[
    int | None,
    typer.Option(
        help="Bits of the keys and values that generation caches: 32, or 16 (fp16) for half the memory and less time a "
        "step in long contexts. Default: as the model's config says."
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run or of a saved model.")]


def check_cache_bits(bits: int | None) -> None:
    """Raise UserError unless `bits` is a value of --cache-bits, or None."""
    if bits not in (None, 32, 16):
        raise UserError(f"--cache-bits must be 32 or 16, got {bits}")
