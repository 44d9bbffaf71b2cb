"""The definition of a study: arms, seeds, measurements and columns of the table."""

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
# arguments: recipe, run folder, whether to resume, callbacks of the trainer
Make = Callable[[RecipeDict, Path, bool, Sequence[TrainerCallback]], object]
SAVE_MINUTES = 10.0  # minutes between checkpoints, the most work that an interruption can cost


def train_run(recipe: RecipeDict, folder: Path, resume: bool, callbacks: Sequence[TrainerCallback]) -> None:
    """Train a model from random weights into a run folder."""
    train(recipe, out=folder, resume=resume, progress=True, save_minutes=SAVE_MINUTES, callbacks=callbacks)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a study's table.

    key: path of the figure in a record's figures, joined by dots. unit: divisor of the figure. format: for Python's
    format(). better: which end is shown in bold, None for neither. relative: add each arm's ratio to the first arm.
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
        """Return the column of tokens/s at `key`."""
        return cls(key=f"{key}.tokens_per_second", title=title, format=",.0f", better="high", relative=True)


@dataclass(frozen=True, kw_only=True)
class Study:
    """A study with its published table.

    purpose: one line, for `--list`. about: paragraphs above the table. arms: recipes by name for a scale, without
    seeds; the first is the reference. seeds: those of each scale, unless the user names others. A seed sets the
    recipe's train.seed and data.seed. make: makes the run of an arm: `train_run`, `adapt_run`, or a function of the
    study. clock: for timings, which make no run: returns the figures of an arm from its recipe; `make`, `measure` and
    `measure_together` are not used then. columns: of the table. corpora: the first available one replaces the recipes'
    own; () keeps them. measure: returns figures of one finished run. measure_together: returns further figures of all
    runs of a seed, by arm, taken in one timing session so that arms compare fairly; None if there are none. derive:
    returns figures that follow from those of all arms of a seed, by arm; called when the table is rendered. details:
    returns Markdown below a table, from the figures of each arm by seed, derived ones included. claims: returns the
    claims judged by rule, from the same figures, for the ledger. closing: returns text printed below the table on the
    terminal. pictures: returns SVG files beside the page, by name, from the same figures.
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
        """Return the arms of `scale`, on `corpus` if one is given.

        Raises ValueError for a scale that is not declared.
        """
        choose(f"scale of study {self.name!r}", scale, self.seeds)
        arms = {name: copy.deepcopy(dict(recipe)) for name, recipe in self.arms(scale).items()}
        for recipe in arms.values() if corpus is not None else ():
            recipe["data"] = {**recipe.get("data", {}), "corpus": corpus}
        return arms

    def variants(self, scale: str) -> list[dict[str, RecipeDict]]:
        """Return the arms on every corpus that they may run on."""
        return [self.recipes(scale, corpus) for corpus in self.corpora or (None,)]


def seeded(recipe: RecipeDict, seed: int) -> RecipeDict:
    """Return the recipe with a seed. A timing's recipe, which has no parts, gets the seed itself."""
    if "train" not in recipe:
        return {**recipe, "seed": seed}
    part = {name: {**recipe.get(name, {}), "seed": seed} for name in ("data", "train")}
    return {**recipe, **part}
