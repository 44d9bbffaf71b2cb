"""What a study is: arms, seeds, what is measured, which columns are shown."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transformers import TrainerCallback

from skipstone.core.strict import PlainDict, PlainMapping, choose
from skipstone.train.training import train
from skipstone_studies.intervals import Claim
from skipstone_studies.measure import measure_together, standard

SCALES = ("laptop", "paper", "quick")
RecipeDict = PlainDict  # as `skipstone train` reads it: {"model": ..., "data": ..., "train": ...}
Figures = PlainMapping
# recipe, run folder, whether to go on with what is there, callbacks of the trainer
Make = Callable[[RecipeDict, Path, bool, Sequence[TrainerCallback]], object]
SAVE_MINUTES = 10.0  # between checkpoints: no stop costs more work than that


def train_run(recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback]) -> None:
    """Train from random weights into a run folder."""
    train(recipe, out=folder, resume=resume, progress=True, save_minutes=SAVE_MINUTES, callbacks=callbacks)


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table.

    key: path of the figure in a record's figures, its steps joined by dots. unit: what the figure is divided by.
    format: as Python's format() takes it.
    better: which end is shown in bold, None for neither. relative: add each arm's ratio to the first arm.
    spread: the figure is {median, min, max} of several turns, and all three are shown.
    """

    key: str
    title: str
    format: str = ".3f"
    unit: float = 1.0
    better: Literal["low", "high"] | None = None
    relative: bool = False
    spread: bool = False

    @classmethod
    def speed(cls, key: str, title: str) -> Column:
        """Tokens/s at `key`."""
        return cls(key=f"{key}.tokens_per_second", title=title, format=",.0f", better="high", relative=True)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A published table.

    purpose: one line, for `--list`. about: paragraphs above the table.
    arms: recipes by name for a scale, without seeds; the first is the one that others are compared with.
    seeds: those of each scale unless the user names others. A seed is the recipe's train.seed and data.seed.
    make: makes a run of an arm's recipe: `train_run`, `adapt_run`, or one of the study's own. It takes the recipe, the
    run folder, whether to go on with what is there, and callbacks that watch the training.
    clock: for timings, which make no run: the figures of an arm, measured from its recipe alone. `make`, `measure` and
    `measure_together` are not used then.
    columns: of the table. corpora: take the first that can be had in place of the recipes' own; () leaves them.
    measure: figures of one finished run. measure_together: further figures of all runs of a seed, by arm, taken in one
    timing session so that arms compare fairly; None where nothing needs that. derive: figures that follow from those of
    all arms of a seed, by arm; computed when the table is rendered. details: Markdown below a table, from the
    figures of each arm by seed, those that `derive` adds included. claims: those that are judged by rule, from the
    same figures, for the ledger. closing: what is said below the table of a scale on the terminal. pictures: SVG
    files by name, from the same figures, which lie beside the page.
    """

    name: str
    purpose: str
    arms: Callable[[str], Mapping[str, RecipeDict]]
    columns: Sequence[Column]
    seeds: Mapping[str, Sequence[int]]
    about: str = ""
    corpora: Sequence[str] = ()
    make: Make = train_run
    clock: Callable[[RecipeDict], Figures] | None = None
    measure: Callable[[Path], Figures] = standard
    measure_together: Callable[[Mapping[str, Path]], Mapping[str, Figures]] | None = measure_together
    derive: Callable[[Mapping[str, Figures]], Mapping[str, Figures]] | None = None
    details: Callable[[Mapping[str, Mapping[int, Figures]]], str] | None = None
    closing: Callable[[str, Mapping[str, Mapping[int, Figures]]], str] | None = None
    claims: Callable[[Mapping[str, Mapping[int, Figures]]], Iterable[Claim]] | None = None
    pictures: Callable[[Mapping[str, Mapping[int, Figures]]], Mapping[str, str]] | None = None

    def recipes(self, scale: str, corpus: str | None = None) -> dict[str, RecipeDict]:
        """The arms of `scale`, on `corpus` if one is named. Raises ValueError for a scale that is not declared."""
        choose(f"scale of study {self.name!r}", scale, self.seeds)
        arms = {name: copy.deepcopy(dict(recipe)) for name, recipe in self.arms(scale).items()}
        for recipe in arms.values() if corpus is not None else ():
            recipe["data"] = {**recipe.get("data", {}), "corpus": corpus}
        return arms

    def variants(self, scale: str) -> list[dict[str, RecipeDict]]:
        """The arms on every corpus that they may run on."""
        return [self.recipes(scale, corpus) for corpus in self.corpora or (None,)]


def seeded(recipe: RecipeDict, seed: int) -> RecipeDict:
    """The recipe of one run. A timing's recipe, which has no parts, gets the seed itself."""
    if "train" not in recipe:
        return {**recipe, "seed": seed}
    part = {name: {**recipe.get(name, {}), "seed": seed} for name in ("data", "train")}
    return {**recipe, **part}
