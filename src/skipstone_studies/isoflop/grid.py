"""Which runs an isoFLOP experiment makes, and what each of them costs.

Equal budget means equal training FLOPs by `model.cost`, so an arm that skips gets more steps:
steps = budget / (training FLOPs of one step as that arm executes it).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.train.config import Recipe as Checked
from skipstone.train.config import read_recipe
from skipstone.train.setup import model_config
from skipstone.train.validation import causal_obstacle
from skipstone_studies.isoflop.spec import Changes, Recipe, Size, Spec

LOG_LINES = 60  # of a run's training curve, about


@dataclass(frozen=True, kw_only=True)
class Shape:
    """An arm at a size. step_flops: training FLOPs of one optimizer step. forward_flops: of a token, causal, promised.

    parameters: all; model: the recipe's section.
    """

    arm: str
    size: Size
    model: dict[str, Any] = field(repr=False, hash=False, compare=False)
    parameters: int
    step_flops: float
    forward_flops: float


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One run but for its seed."""

    shape: Shape
    budget: float
    rate: float
    steps: int
    recipe: Recipe = field(repr=False)

    @property
    def arm(self) -> str:
        return self.shape.arm

    @property
    def size(self) -> Size:
        return self.shape.size

    @property
    def flops(self) -> float:
        """Training FLOPs that the steps come to: the budget, to half a step."""
        return self.steps * self.shape.step_flops

    @property
    def label(self) -> str:
        return f"{self.arm}-{compact(self.budget)}-{self.size}-lr{self.rate:g}"


def compact(value: float) -> str:
    """3e+12 as 3e12."""
    return re.sub(r"e\+0*", "e", f"{value:g}")


class Grid:
    """The runs of a spec. Nothing here is trained or read from disk; models are built without memory."""

    def __init__(self, spec: Spec) -> None:
        self.spec = spec
        self.base = read_recipe(spec.recipe)
        self.once = spec.data.sampling == "once"
        self._shapes: dict[tuple[str, Size], Shape] = {}
        self.sizes = sorted(spec.parsed_sizes(), key=lambda size: self.shape(spec.arms[0], size).parameters)
        self.budgets = sorted(spec.budgets)

    def shape(self, arm: str, size: Size) -> Shape:
        """Raises ValueError for widths that the heads do not fit, budgets apart, and for arms without a causal form."""
        if (arm, size) not in self._shapes:
            self._shapes[arm, size] = _shape(self.base, arm, size, self.spec.known[arm])
        return self._shapes[arm, size]

    def cell(self, arm: str, budget: float, size: Size, rate: float) -> Cell:
        shape = self.shape(arm, size)
        steps = round(budget / shape.step_flops)
        if budget < shape.step_flops:
            raise ValueError(
                f"budget {compact(budget)} is less than one step of {arm} {size}, which takes {shape.step_flops:.3g} "
                "training FLOPs; take a larger budget, a smaller size or fewer rows a step (train.batch_size)"
            )
        return Cell(shape=shape, budget=budget, rate=rate, steps=steps, recipe=self._recipe(shape, steps, rate))

    @property
    def middle(self) -> Size:
        """Where learning rates are tried: of an even number of sizes the lower middle one."""
        return self.sizes[(len(self.sizes) - 1) // 2]

    def sweep(self, arm: str) -> list[Cell]:
        """Every rate once, at the smallest budget and the middle size; nothing where there is one rate only."""
        if len(self.spec.rates) == 1:
            return []
        return [self.cell(arm, self.budgets[0], self.middle, rate) for rate in self.spec.rates]

    def rate(self, chosen: float, size: Size) -> float:
        """The rate of a size, by the rule, from the one that was best at the middle size. To three digits."""
        if self.spec.rate_rule == "constant":
            return chosen
        return float(f"{chosen * self.middle.width / size.width:.3g}")

    def cells(self, arm: str, chosen: float) -> list[Cell]:
        """The arm's part of the grid."""
        return [self.cell(arm, budget, size, self.rate(chosen, size)) for budget in self.budgets for size in self.sizes]

    def everything(self) -> list[Cell]:
        """All cells of the grid at the first rate, in the order in which they run: the arms of a size side by side."""
        rate = self.spec.rates[0]
        return [
            self.cell(arm, budget, size, rate)
            for budget in self.budgets
            for size in self.sizes
            for arm in self.spec.arms
        ]

    def _recipe(self, shape: Shape, steps: int, rate: float) -> Recipe:
        """Warm-up keeps its share of the steps. Validation is left to `measure`: once, when the run is finished."""
        train = {
            **(self.spec.recipe.get("train") or {}),
            "steps": steps,
            "learning_rate": rate,
            "warmup_steps": round(steps * self.base.train.warmup_steps / self.base.train.steps),
            "log_every": max(1, steps // LOG_LINES),
            "eval_every": 0,
            "eval_rows": 1,
        }
        data = {**(self.spec.recipe.get("data") or {}), **({"sampling": "once"} if self.once else {})}
        return {"model": shape.model, "data": data, "train": train}

    @property
    def other_seeds(self) -> Sequence[int]:
        return range(self.spec.seed + 1, self.spec.seed + self.spec.optimum_seeds)


def _shape(base: Checked, arm: str, size: Size, changes: Changes) -> Shape:
    model = sized(base, size, changes)
    config = model_config(model, base.data.context, {})
    with torch.device("meta"):
        built = SkipstoneForCausalLM(config)
    obstacle = causal_obstacle(built)
    if obstacle is not None:
        raise ValueError(f"arm {arm!r} has no causal loss to compare: {obstacle}")
    cost = built.cost(tokens=base.data.context, batch=base.train.batch_size)
    return Shape(
        arm=arm,
        size=size,
        model=model,
        parameters=cost.parameters.total,
        step_flops=cost.training.total,
        forward_flops=cost.forward_per_token.total,
    )


def sized(base: Checked, size: Size, changes: Changes) -> dict[str, Any]:
    """The recipe's model, changed, at another size: as many heads of the same size as the width holds; MLPs in
    proportion."""
    was = model_config(base.model, base.data.context, {})
    head_dim, groups = was.head_dim or 1, was.num_attention_heads // (was.num_key_value_heads or 1)
    if size.width % (head_dim * groups):
        raise ValueError(
            f"size {str(size)!r}: the width must be a multiple of {head_dim * groups}, because heads keep their size "
            f"({head_dim})" + (f" and {groups} share keys and values" if groups > 1 else "")
        )
    heads = size.width // head_dim
    own = copy.deepcopy({**base.model, **changes})
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
