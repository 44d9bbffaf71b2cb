"""The specification of an isoFLOP study: its recipe, budgets, sizes, learning rates and arms (compared recipes).

Nothing here loads torch, so that mistakes are reported at once.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from skipstone.core.placeholders import checked_lightly
from skipstone.core.strict import PlainDict, is_folder_name, mistakes, refuse, unknown
from skipstone.data.config import DataConfig
from skipstone.data.corpora import find_entry
from skipstone.train.recipe import read_recipe

Changes = PlainDict  # changes of the recipe's section `model`
DENSE = "dense"
SIZED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")

# laptop: an hour on one core. paper: the budgets of arXiv 2404.02258, section 4.1, and sizes over its range of
# parameters (60M to 3B with a vocabulary of 32,000); the paper gives neither widths nor learning rates.
GRIDS: dict[str, PlainDict] = {
    "laptop": {
        "budgets": [5e11, 1.5e12],
        "sizes": ["16x4", "24x4", "32x4", "48x4"],
        "rates": [4e-3, 8e-3, 1.6e-2],
    },
    "paper": {
        "budgets": [6e18, 2e19, 1e20],
        "sizes": ["512x8", "768x12", "1024x12", "1280x16", "1536x18", "2048x18", "2560x22", "3072x24"],
        "rates": [3e-4, 6e-4, 1.2e-3],
    },
}


@dataclass(frozen=True)
class GridSize:
    """A model size: width of the residual stream and number of blocks."""

    width: int
    blocks: int

    def __str__(self) -> str:
        return f"{self.width}x{self.blocks}"


def parse_size(word: object, blocks: int) -> GridSize:
    """Parse a model size such as `128x6` (width and number of blocks) or `128`.

    word: the text. blocks: the number of blocks if the text has none. Raises ValueError for anything else.
    """
    found = re.fullmatch(r"([1-9][0-9]*)(?:x([1-9][0-9]*))?", str(word).strip())
    if found is None:
        raise ValueError(f"size {str(word)!r} is neither WIDTH nor WIDTHxBLOCKS, such as 128 or 128x6")
    return GridSize(int(found[1]), int(found[2] or blocks))


def arms_of(recipe: PlainDict) -> dict[str, Changes]:
    """Return the variants of a recipe (arms) that are compared by default, {name: changes of the section `model`}.

    "dense" has no mechanisms. If the recipe has any, "mod" has these mechanisms ("routed" is its name if not all are
    Mixture-of-Depths). If a Mixture-of-Depths among them does not choose tokens at random, "random" is the same arm
    with every Mixture-of-Depths doing so.
    """
    entries = [dict(entry) for entry in (recipe.get("model") or {}).get("mechanisms") or []]
    arms: dict[str, Changes] = {DENSE: {"mechanisms": []}}
    if not entries:
        return arms
    mod = [entry for entry in entries if entry.get("name") == "mixture_of_depths"]
    arms["mod" if len(mod) == len(entries) else "routed"] = {"mechanisms": entries}
    if any(entry.get("decision") != "random" for entry in mod):
        random = [{**entry, "decision": "random"} if entry in mod else entry for entry in entries]
        arms["random"] = {"mechanisms": random}
    return arms


MOST_SEEDS = 1000  # more are typing mistakes: each is a run


@dataclass(frozen=True, kw_only=True)
class GridSpec:
    """The specification of an isoFLOP grid: arms and sizes that are trained with equal training FLOPs.

    name: the name of the study and of its folder. recipe: the base, as `skipstone train` reads it, with its vocabulary
    size. budgets: training FLOPs of a run. sizes: model sizes, WIDTH or WIDTHxBLOCKS; attention heads keep their size.
    rates: learning rates that every arm tries at the smallest budget and middle size. arms: names of the arms to run.
    changes: {arm: changes of the recipe's section `model`} for every arm that could run; None means the default arms
    (dense, the recipe's own mechanisms, random). rate_rule: whether the best rate is used for all sizes (constant), or
    scaled with 1 / width (inverse_width). seed: the first seed, with which every cell of the grid is run.
    optimum_seeds: number of seeds at the size nearest to each optimum, the first one included. allow_repeats: whether
    runs may read the corpus more than once.
    """

    name: str
    recipe: PlainDict
    budgets: list[float]
    sizes: list[str]
    rates: list[float]
    arms: list[str]
    changes: dict[str, Changes] | None = None
    rate_rule: Literal["constant", "inverse_width"] = "constant"
    seed: int = 0
    optimum_seeds: int = 3
    allow_repeats: bool = False

    def __post_init__(self) -> None:
        for what, name in (("name", self.name), *(("arm", arm) for arm in self.known)):
            if not is_folder_name(name):
                raise ValueError(f"{what} must be the name of a folder, got {name!r}")
        for field in ("budgets", "sizes", "rates"):
            _check_list(field, getattr(self, field))
        for field in ("budgets", "rates"):
            for value in getattr(self, field):
                if not 0 < value < math.inf:
                    raise ValueError(f"{field} must be above 0, got {value}")
        known = self.known
        for arm, changes in known.items():
            for key in SIZED:
                if key in changes:
                    raise ValueError(f"arms.{arm} changes {key}, but sizes are the grid's; leave it out")
        for arm in self.arms:
            if arm not in known:
                raise ValueError(unknown("arm of this recipe", arm, known))
        _check_list("arms", self.arms)
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not 1 <= self.optimum_seeds <= MOST_SEEDS:
            raise ValueError(f"optimum_seeds must be from 1 to {MOST_SEEDS:,}, got {self.optimum_seeds:,}")

    @property
    def known(self) -> dict[str, Changes]:
        """All variants of the recipe (arms) that could run, {name: its changes of the recipe's section `model`}."""
        return arms_of(self.recipe) if self.changes is None else self.changes

    @property
    def base(self) -> str:
        """The name of the arm (recipe) with which others are compared.

        With the default arms the base is "dense"; if "dense" is not run, nothing is compared and the page says so. If
        the recipe names its own arms, the base is "dense" if an arm of this name is run, else the first arm that is
        run.
        """
        return DENSE if self.changes is None or DENSE in self.arms else self.arms[0]

    @property
    def data(self) -> DataConfig:
        """The recipe's data options; each window (row) of a text is read at most once unless repeats are allowed."""
        own = read_recipe(self.recipe).data
        once = not self.allow_repeats and find_entry(own.corpus)[0].kind == "text"
        return replace(own, sampling="once") if once else own

    def parsed_sizes(self) -> list[GridSize]:
        """Return the model sizes of the grid, in the order of `sizes`; a size written as WIDTH alone has one block."""
        return [parse_size(word, 1) for word in self.sizes]

    def to_dict(self) -> PlainDict:
        """Return the specification as plain values by field."""
        return asdict(self)


def _check_list(field: str, values: Sequence[object]) -> None:
    if not values or len(set(values)) < len(values):
        raise ValueError(f"{field} must be at least one value, none twice; got {', '.join(map(str, values)) or 'none'}")


def make_spec(recipe: PlainDict, *, scale: str = "laptop", **given: object) -> GridSpec:
    """Build the specification of an isoFLOP grid from a recipe and the values that the user gave.

    recipe: a plain dict; its section `arms` is {arm: changes of the section `model`}; without it, the arms are those of
    `arms_of`. scale: "laptop" or "paper", which provides budgets, sizes and rates that are not given. given: fields of
    `GridSpec` by name; those that are None count as not given. Raises ValueError for invalid sizes, arms (compared
    recipes) and numbers.
    """
    if scale not in GRIDS:
        raise ValueError(unknown("scale", scale, GRIDS))
    recipe = dict(recipe)
    model = recipe.get("model") or {}
    if not isinstance(model, Mapping):
        raise ValueError(f"model must be a mapping of keys to values, got {model!r}")
    entries = model.get("mechanisms") or []
    if not isinstance(entries, list) or not all(isinstance(entry, Mapping) for entry in entries):
        raise ValueError(f"model.mechanisms must be a list of mappings, got {entries!r}")
    blocks = model.get("num_hidden_layers") or 6
    if type(blocks) is not int:
        raise ValueError(f"model.num_hidden_layers must be int, got {blocks!r}")
    changes = _changes(recipe.pop("arms", None))
    values = {**GRIDS[scale], **{name: value for name, value in given.items() if value is not None}}
    sizes = [str(parse_size(word, blocks)) for word in values.pop("sizes")]
    arms = list(values.pop("arms", None) or changes or arms_of(recipe))
    values = {**values, "budgets": [float(b) for b in values["budgets"]], "rates": [float(r) for r in values["rates"]]}
    name = str(recipe.get("name") or "isoflop")
    return GridSpec(name=name, recipe=recipe, sizes=sizes, arms=arms, changes=changes, **values)


def checked_spec(recipe: PlainDict, *, scale: str = "laptop", **given: object) -> GridSpec:
    """Build the specification of an isoFLOP grid from a recipe and the user's values, and check all of its models.

    recipe: a plain dict; its section `arms` is {arm: changes of the section `model`}; without it, the arms are those of
    `arms_of`. scale: "laptop" or "paper", which provides budgets, sizes and rates that are not given. given: fields of
    `GridSpec` by name; None counts as not given. Raises ValueError with one line for each mistake in the recipe and in
    the models of all arms (compared recipes) and sizes, without loading torch. Whether the corpus exists is not
    checked.
    """
    lines: list[str] = []
    own = {key: value for key, value in recipe.items() if key != "arms"}
    try:
        read_recipe(own)
    except ValueError as error:
        lines += mistakes(error)
    checked: object
    module, checked = "skipstone.train.setup", own  # if there is no grid, the recipe's own model is checked
    try:
        spec = make_spec(recipe, scale=scale, **given)
    except ValueError as error:
        lines += mistakes(error)
    else:
        module, checked = "skipstone_studies.isoflop.grid", spec
    refuse([*dict.fromkeys([*lines, *checked_lightly(module, "model_mistakes", checked)])])
    return spec


def _changes(arms: Any) -> dict[str, Changes] | None:
    if arms is None:
        return None
    if not isinstance(arms, Mapping) or not arms:
        raise ValueError(f"arms must be a mapping of names to changes of the model, got {arms!r}")
    for name, changes in arms.items():
        if not isinstance(changes, Mapping | None):
            raise ValueError(f"arms.{name} must be a mapping, changes of the model, got {changes!r}")
    return {str(name): dict(changes or {}) for name, changes in arms.items()}
