"""The runs of an isoFLOP study, their costs, and whether the corpus has enough text for them.

An equal budget means equal training FLOPs by the cost model, so an arm (compared recipe) that skips gets more steps:

    steps = budget / (training FLOPs of one step as that arm executes it)
"""

from __future__ import annotations

import copy
import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from skipstone.core.routing_module import causal_obstacle
from skipstone.core.strict import PlainDict, mistakes
from skipstone.data.config import DataConfig
from skipstone.data.corpora import find_entry
from skipstone.data.prepare import PreparedData, prepare
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.train.recipe import Recipe, read_recipe
from skipstone.train.setup import model_config
from skipstone.train.setup import model_mistakes as recipe_mistakes
from skipstone_studies.isoflop.spec import Changes, GridSize, GridSpec

LOG_LINES = 60  # approximate number of log lines per run


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """The model of an arm (compared recipe) at one size, with its costs by the cost model.

    arm: name of the arm. size: width and number of blocks. model: the recipe's section `model` at this size.
    parameters: number of parameters. step_flops: training FLOPs of one optimizer step. forward_flops: FLOPs per token
    of a forward pass whose decisions are causal, if every mechanism keeps its configured share of tokens (`capacity`).
    """

    arm: str
    size: GridSize
    model: PlainDict = field(repr=False, hash=False, compare=False)
    parameters: int
    step_flops: float
    forward_flops: float


@dataclass(frozen=True, kw_only=True)
class GridCell:
    """A run of an isoFLOP grid without its seed: an arm (compared recipe) at one size, budget and learning rate.

    shape: arm and size with their costs. budget: training FLOPs that the run may use. rate: peak learning rate. steps:
    optimizer steps that the budget allows. recipe: the recipe of the run, without a seed.
    """

    shape: ModelShape
    budget: float
    rate: float
    steps: int
    recipe: PlainDict = field(repr=False)

    @property
    def arm(self) -> str:
        """The name of the arm, the compared recipe that the run belongs to."""
        return self.shape.arm

    @property
    def size(self) -> GridSize:
        """The size of the model."""
        return self.shape.size

    @property
    def flops(self) -> float:
        """The training FLOPs of all steps; they differ from the budget by at most half a step."""
        return self.steps * self.shape.step_flops

    @property
    def label(self) -> str:
        """The name of this run, without its seed, in folders and stored results, such as `dense-1e12-32x4-lr0.008`."""
        return f"{self.arm}-{compact(self.budget)}-{self.size}-lr{self.rate:g}"


def compact(value: float) -> str:
    """Format `value` as 3e12 instead of 3e+12, with at most six significant digits."""
    return re.sub(r"e\+0*", "e", f"{value:g}")


class Grid:
    """All runs that an isoFLOP specification describes, with their costs; nothing is trained or read from disk.

    spec: arms (compared recipes), sizes, budgets and learning rates. Attributes: `base`, the parsed recipe; `once`,
    whether each window of text is read at most once; `sizes`, the sizes in ascending order of the first arm's
    parameters; `budgets`, the training FLOPs of a run in ascending order. Models are built without memory, on the meta
    device.
    """

    def __init__(self, spec: GridSpec) -> None:
        self.spec = spec
        self.base = read_recipe(spec.recipe)
        self.once = spec.data.sampling == "once"
        self._shapes: dict[tuple[str, GridSize], ModelShape] = {}
        self.sizes = sorted(spec.parsed_sizes(), key=lambda size: self.shape(spec.arms[0], size).parameters)
        self.budgets = sorted(spec.budgets)

    def shape(self, arm: str, size: GridSize) -> ModelShape:
        """Return the model of an arm (a compared recipe) at a size, with its costs.

        arm: name of the arm. size: width and number of blocks. Raises ValueError for a width that does not fit the size
        of the heads, and for an arm that cannot decide without later tokens.
        """
        if (arm, size) not in self._shapes:
            self._shapes[arm, size] = _shape(self.base, arm, size, self.spec.known[arm])
        return self._shapes[arm, size]

    def cell(self, arm: str, budget: float, size: GridSize, rate: float) -> GridCell:
        """Return the run, without its seed, of an arm (compared recipe) at a budget, size and learning rate.

        arm: name of the arm. budget: training FLOPs. size: width and number of blocks. rate: peak learning rate. Raises
        ValueError for a budget of less than one step.
        """
        shape = self.shape(arm, size)
        steps = round(budget / shape.step_flops)
        if budget < shape.step_flops:
            raise ValueError(
                f"budget {compact(budget)} is less than one step of {arm} {size}, which takes {shape.step_flops:.3g} "
                "training FLOPs; take a larger budget, a smaller size or fewer rows a step (train.batch_size)"
            )
        return GridCell(shape=shape, budget=budget, rate=rate, steps=steps, recipe=self._recipe(shape, steps, rate))

    @property
    def middle(self) -> GridSize:
        """The size at which learning rates are tried: the middle one, or the smaller of the two in the middle."""
        return self.sizes[(len(self.sizes) - 1) // 2]

    def sweep(self, arm: str) -> list[GridCell]:
        """Return the runs of `arm` that try the learning rates, at the smallest budget and the middle size.

        arm: name of a compared recipe. The list is empty if the specification has only one rate.
        """
        if len(self.spec.rates) == 1:
            return []
        return [self.cell(arm, self.budgets[0], self.middle, rate) for rate in self.spec.rates]

    def rate(self, chosen: float, size: GridSize) -> float:
        """Return the learning rate for a model size, which follows from the best rate at the middle size.

        chosen: the best rate at the middle size. size: the model size. With `rate_rule: constant` in the specification,
        `chosen` is returned unchanged; otherwise the rate is inversely proportional to the width and rounded to three
        digits.
        """
        if self.spec.rate_rule == "constant":
            return chosen
        return float(f"{chosen * self.middle.width / size.width:.3g}")

    def cells(self, arm: str, chosen: float) -> list[GridCell]:
        """Return all runs of an arm (compared recipe), without their seeds: one for every budget and size.

        arm: name of the arm. chosen: its best learning rate at the middle size.
        """
        return [self.cell(arm, budget, size, self.rate(chosen, size)) for budget in self.budgets for size in self.sizes]

    def everything(self) -> list[GridCell]:
        """Return all runs of the grid at the first learning rate, without their seeds, in the order in which they run.

        Runs of one size are adjacent.
        """
        rate = self.spec.rates[0]
        return [
            self.cell(arm, budget, size, rate)
            for budget in self.budgets
            for size in self.sizes
            for arm in self.spec.arms
        ]

    def _recipe(self, shape: ModelShape, steps: int, rate: float) -> PlainDict:
        """Return the recipe of a run, without a seed.

        shape: arm and size. steps: number of steps, of which warm-up has the same share as in the base recipe. rate:
        the learning rate. The training does not validate; the run is measured after it.
        """
        train = {
            **(self.spec.recipe.get("train") or {}),
            "steps": steps,
            "learning_rate": rate,
            "warmup_steps": round(steps * (self.base.train.warmup_steps or 0) / self.base.train.steps),
            "log_every": max(1, steps // LOG_LINES),
            "eval_every": 0,
            "eval_rows": 1,
        }
        data = {**(self.spec.recipe.get("data") or {}), **({"sampling": "once"} if self.once else {})}
        return {"model": shape.model, "data": data, "train": train}

    @property
    def other_seeds(self) -> Sequence[int]:
        """The further seeds with which the sizes nearest to the optima are run, besides the grid's first seed."""
        return range(self.spec.seed + 1, self.spec.seed + self.spec.optimum_seeds)


def _shape(base: Recipe, arm: str, size: GridSize, changes: Changes) -> ModelShape:
    model = sized(base.model, base.data.context, size, changes)
    config = model_config(model, base.data.context, {})
    with torch.device("meta"):
        built = SkipstoneForCausalLM(config)
    obstacle = causal_obstacle(built.routing_modules())
    if obstacle is not None:
        raise ValueError(f"arm {arm!r} has no causal loss to compare: {obstacle}")
    cost = built.cost(tokens=base.data.context, batch=base.train.batch_size)
    return ModelShape(
        arm=arm,
        size=size,
        model=model,
        parameters=cost.parameters.total,
        step_flops=cost.training.total,
        forward_flops=cost.forward_per_token.total,
    )


def model_mistakes(spec: GridSpec) -> list[str]:
    """Return one message per mistake in the models of an isoFLOP grid, at each of its sizes.

    spec: the specification, whose recipe may be wrong in other sections. The message about a mistake that not all arms
    (compared recipes) share begins with the name of the arm.
    """
    base = recipe_mistakes(spec.recipe)
    if base:
        return base
    context = spec.data.context
    found: dict[str, list[str]] = {}
    for arm in spec.arms:
        for size in spec.parsed_sizes():
            try:
                model_config(sized(spec.recipe["model"], context, size, spec.known[arm]), context, {})
            except ValueError as error:
                for line in mistakes(error):
                    found.setdefault(line, []).append(arm)
    return [line if {*arms} == {*spec.arms} else f"arm {arms[0]!r}: {line}" for line, arms in found.items()]


def sized(model: PlainDict, context: int, size: GridSize, changes: Changes) -> PlainDict:
    """Return a recipe's section `model` for one arm (compared variant) at another size.

    model: the section. context: tokens per row. size: width and number of blocks; heads keep their size, so their
    number changes, and MLPs scale with the width. changes: options in which the arm differs from the recipe. Raises
    ValueError unless the width is a multiple of the size of a head times the query heads per key-value head.
    """
    was = model_config(model, context, {})
    head_dim, groups = was.head_dim or 1, was.num_attention_heads // (was.num_key_value_heads or 1)
    if size.width % (head_dim * groups):
        raise ValueError(
            f"size {str(size)!r}: the width must be a multiple of {head_dim * groups}, because heads keep their size "
            f"({head_dim})" + (f" and {groups} share keys and values" if groups > 1 else "")
        )
    heads = size.width // head_dim
    own = copy.deepcopy({**model, **changes})
    if own.get("intermediate_size"):
        own["intermediate_size"] = round(own["intermediate_size"] * size.width / was.hidden_size)
    return {
        **own,
        "hidden_size": size.width,
        "num_hidden_layers": size.blocks,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // groups,
        "head_dim": head_dim,
    }


@dataclass(frozen=True, kw_only=True)
class CorpusFacts:
    """What is known of the corpus of an isoFLOP grid.

    vocab_size: size of the vocabulary; None if the corpus was not read. tokens: number of tokens in the training split;
    None if unlimited or not known. sha256: SHA-256 of the training split's token ids, in hexadecimal; None without
    them. data: the rows of the corpus; None if it was not read. trouble: why it was not read; "" if it was.
    """

    vocab_size: int | None = None
    tokens: int | None = None
    sha256: str | None = None
    data: PreparedData | None = None
    trouble: str = ""

    def to_dict(self) -> PlainDict:
        """Return the facts that the record (stored result) of a run has: `tokens` and `sha256`."""
        return {"tokens": self.tokens, "sha256": self.sha256}


def read_corpus(config: DataConfig) -> CorpusFacts:
    """Read the corpus and return the facts on it, with its rows.

    config: the recipe's section `data`. Raises ValueError or FileNotFoundError if it is not available.
    """
    data = prepare(config)
    ids: Any = getattr(data.train, "ids", None)
    return CorpusFacts(
        vocab_size=data.vocab_size,
        tokens=None if ids is None else len(ids),
        sha256=None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest(),
        data=data,
    )


def read_corpus_if_cheap(config: DataConfig) -> CorpusFacts:
    """Read the corpus for an estimate, unless it is a dataset of the Hub or synthetic, and return the facts on it.

    config: the recipe's section `data`. If the corpus is not read or is missing, the result has only the reason, as
    `trouble`. Raises ValueError for a corpus that is not valid.
    """
    if config.corpus.startswith("hf:") or find_entry(config.corpus)[0].kind == "synthetic":
        return CorpusFacts(trouble=f"corpus {config.corpus} was not read")
    try:
        return read_corpus(config)
    except FileNotFoundError as error:
        return CorpusFacts(trouble=str(error))


def corpus_share(grid: Grid, cell: GridCell, facts: CorpusFacts) -> float | None:
    """Return how many times a run reads the corpus (1 means once); None if it is unlimited or its size is not known.

    grid: the isoFLOP grid (runs at equal training FLOPs) that the run belongs to. cell: the run without its seed.
    facts: what is known of the corpus.
    """
    return None if facts.tokens is None else cell.steps * tokens_per_step(grid) / facts.tokens


def tokens_per_step(grid: Grid) -> int:
    """Return the number of tokens in an optimizer step, which is the same for all runs of an isoFLOP grid."""
    return grid.base.train.batch_size * grid.base.data.context


def check_once(grid: Grid, facts: CorpusFacts) -> None:
    """Raise ValueError if a run of an isoFLOP grid would read text twice and its specification does not allow it.

    grid: the runs. facts: what is known of the corpus; nothing is raised if its number of tokens is not known.
    """
    if not grid.once or facts.tokens is None:
        return
    greedy = max(grid.everything(), key=lambda cell: cell.steps)
    rows, there = greedy.steps * grid.base.train.batch_size, facts.tokens // grid.base.data.context
    if rows > there:
        raise ValueError(
            f"{greedy.arm} {greedy.size} at budget {greedy.budget:.3g} reads {rows:,} rows of {grid.base.data.context} "
            f"tokens, and {grid.base.data.corpus} has {there:,}: it would see text {rows / there:.1f} times; take a "
            "larger corpus, smaller budgets or larger sizes, or allow it (--allow-repeats)"
        )
