"""What an experiment is: arms, seeds, what is measured, which columns are shown."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from skipstone.core.strict import choose
from skipstone_studies.measure import standard
from skipstone_studies.measure import together as timed

SCALES = ("laptop", "paper")
Recipe = dict[str, Any]  # as `skipstone train` reads it: {"model": ..., "data": ..., "train": ...}
Figures = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column of the table.

    key: path of the figure in a record's figures, its steps joined by dots. unit: what the figure is divided by.
    format: as Python's format() takes it.
    better: which end is shown in bold, None for neither. relative: add each arm's ratio to the first arm.
    """

    key: str
    title: str
    format: str = ".3f"
    unit: float = 1.0
    better: Literal["low", "high"] | None = None
    relative: bool = False

    @classmethod
    def speed(cls, key: str, title: str) -> Column:
        """Tokens/s at `key`."""
        return cls(key=f"{key}.tokens_per_second", title=title, format=",.0f", better="high", relative=True)


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """A published table.

    purpose: one line, for `--list`. about: paragraphs above the table.
    arms: recipes by name for a scale, without seeds; the first is the one that others are compared with.
    seeds: those of each scale unless the user names others. A seed is the recipe's train.seed and data.seed.
    columns: of the table. corpora: take the first that can be had in place of the recipes' own; () leaves them.
    measure: figures of one finished run. together: further figures of all runs of a seed, measured in one sitting so
    that arms compare fairly, by arm; None where nothing needs that. derive: figures that follow from those of all arms
    of a seed, by arm; computed when the table is rendered. details: Markdown below a table, from the figures of each
    arm by seed, those that `derive` adds included.
    """

    name: str
    purpose: str
    arms: Callable[[str], Mapping[str, Recipe]]
    columns: Sequence[Column]
    seeds: Mapping[str, Sequence[int]]
    about: str = ""
    corpora: Sequence[str] = ()
    measure: Callable[[Path], Figures] = standard
    together: Callable[[Mapping[str, Path]], Mapping[str, Figures]] | None = timed
    derive: Callable[[Mapping[str, Figures]], Mapping[str, Figures]] | None = None
    details: Callable[[Mapping[str, Mapping[int, Figures]]], str] | None = None

    def recipes(self, scale: str, corpus: str | None = None) -> dict[str, Recipe]:
        """The arms of `scale`, on `corpus` if one is named. Raises ValueError for a scale that is not declared."""
        choose(f"scale of experiment {self.name!r}", scale, self.seeds)
        arms = {name: copy.deepcopy(dict(recipe)) for name, recipe in self.arms(scale).items()}
        for recipe in arms.values() if corpus is not None else ():
            recipe["data"] = {**recipe.get("data", {}), "corpus": corpus}
        return arms

    def variants(self, scale: str) -> list[dict[str, Recipe]]:
        """The arms on every corpus that they may run on."""
        return [self.recipes(scale, corpus) for corpus in self.corpora or (None,)]


def seeded(recipe: Recipe, seed: int) -> Recipe:
    """The recipe of one run."""
    part = {name: {**recipe.get(name, {}), "seed": seed} for name in ("data", "train")}
    return {**recipe, **part}
