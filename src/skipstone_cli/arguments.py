"""The command-line arguments that several verbs share, so that their names and help texts are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeFile = Annotated[
    Path, typer.Argument(metavar="RECIPE.yaml", help="YAML file that describes model, data and training.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="key=value", help="Replace a value of the recipe, as train.steps=500; the last one of a key wins."
    ),
]
RunFolder = Annotated[Path, typer.Argument(metavar="RUN", help="Folder of a training run or of a saved model.")]
