"""The definition of a study: compared recipes (arms), seeds, measurements, and columns of its table."""

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
    """Train a model from random weights into a run folder.

    recipe: a dict with the sections model, data and train. folder: the run folder. resume: whether to continue an
    interrupted run. callbacks: further callbacks of the trainer.
    """
    train(recipe, out=folder, resume=resume, progress=True, save_minutes=SAVE_MINUTES, callbacks=callbacks)


@dataclass(frozen=True, kw_only=True)
class Column:
    """A column of a study's table.

    key: dotted path of the figure in the nested figures of a run, such as "training.tokens". title: the heading.
    format: a format specification, as for Python's format(). unit: the number by which the figure is divided. better:
    whether "low" or "high" values are better, of which the best mean is shown in bold; None means neither. relative:
    whether to add each arm's ratio to the first arm (compared recipe). spread: whether the figure is a dict of the
    median, min and max of several measurements, which are all shown.
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
        """Return a column of tokens per second.

        key: dotted path of a timing among the figures, a dict with `tokens_per_second`. title: the heading.
        """
        return cls(key=f"{key}.tokens_per_second", title=title, format=",.0f", better="high", relative=True)


@dataclass(frozen=True, kw_only=True)
class Study:
    """The definition of a study: what is run, what is measured, and what its published page shows.

    name: the name of the study. purpose: one line, for lists. about: paragraphs above the table. arms: a function that
    returns the compared recipes of a scale (size, such as "laptop") by name, without seeds; the first is the reference.
    seeds: the seeds of each scale, which set train.seed and data.seed. corpora: names of corpora, the first available
    of which replaces the recipes' own; () means that the recipes' own stay. make: a function that makes the run of an
    arm. clock: for timings without runs, a function that returns the figures of an arm from its recipe; `make`,
    `measure` and `measure_together` are not used then. measure: a function that returns figures of a finished run,
    given its folder. measure_together: a function that returns further figures of all runs of a seed, by arm, taken in
    one session so that they compare fairly; None means that there are none. columns: the columns of the table.

    The other functions, unless they are None, are called when the page is rendered. derive returns figures by arm that
    follow from the figures of all arms of a seed. The rest get the figures by arm and seed: details returns Markdown
    below a table, claims the claims that are judged, pictures SVG files by name, and closing, which gets the scale
    first, text printed below the table in the terminal.
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
        """Return the recipes that the study compares (its arms) at a scale, by name.

        scale: name of a size of the study, such as "laptop". corpus: name of a corpus that replaces the recipes' own;
        None means that it stays. Raises ValueError for a scale that the study does not have.
        """
        choose(f"scale of study {self.name!r}", scale, self.seeds)
        arms = {name: copy.deepcopy(dict(recipe)) for name, recipe in self.arms(scale).items()}
        for recipe in arms.values() if corpus is not None else ():
            recipe["data"] = {**recipe.get("data", {}), "corpus": corpus}
        return arms

    def variants(self, scale: str) -> list[dict[str, RecipeDict]]:
        """Return a list with the compared recipes at a scale, {name: recipe}, once for each corpus in `corpora`.

        If `corpora` is empty, they are there once, with their own corpus.

        scale: name of a size of the study, such as "laptop".
        """
        return [self.recipes(scale, corpus) for corpus in self.corpora or (None,)]


def recipe_file(folder: Path) -> Path:
    """Return the path of the file beside a run folder that holds the recipe of the run."""
    return folder.with_name(f"{folder.name}.recipe.json")


def seeded(recipe: RecipeDict, seed: int) -> RecipeDict:
    """Return a copy of a recipe with a seed in its sections train and data.

    The recipe of a timing has no sections and gets the key `seed` itself.
    """
    if "train" not in recipe:
        return {**recipe, "seed": seed}
    part = {name: {**recipe.get(name, {}), "seed": seed} for name in ("data", "train")}
    return {**recipe, **part}
