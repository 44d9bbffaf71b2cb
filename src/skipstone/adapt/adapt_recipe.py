"""`AdaptRecipe`: the options for adapting a dense checkpoint, read strictly from plain dicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from skipstone.core.strict import PlainMapping, finite, from_dict, unknown
from skipstone.train.recipe import Recipe

MODEL_KEYS = ("mechanisms", "activation", "neuron_groups", "drop_layers")
LORA = "routers+lora"
Trained = Literal["routers", "routers+lora", "all"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of an adaptation, with its own trained parameters and learning rates.

    train_only: which parameters are trained: routers (all parameters of mechanisms), routers+lora (also low-rank
    adapters on every projection of the blocks, merged at the end), or all (every weight, no adapters); None means the
    value in the recipe's section `adapt`. steps: optimizer steps of the stage, at least 1; has to be given.
    learning_rate: the peak, reached after warmup_steps; in every stage the rate decays anew by cosine to
    train.min_lr_ratio times the peak. None means train.learning_rate. router_learning_rate: the peak for parameters of
    mechanisms; None means the value in the section `adapt`, or else the stage's learning_rate. warmup_steps: steps of
    linear warm-up; None means train.warmup_steps, but at most `steps`. routing: how training passes decide: oracle (as
    in ordinary training: routers may look at later tokens of the row, gates scale updates and skip nothing), or causal
    (the pass that generation executes: no look at later tokens, hard gates, no noise); None means oracle.

    `read_recipe` replaces every None by the value that it means, and raises ValueError for values out of range.
    """

    train_only: Trained | None = None
    steps: int | None = None
    learning_rate: float | None = None
    router_learning_rate: float | None = None
    warmup_steps: int | None = None
    routing: Literal["oracle", "causal"] | None = None


@dataclass(frozen=True, kw_only=True)
class Loss:
    """The coefficients of an adaptation's loss terms; the auxiliary losses of mechanisms are added to them.

    Each term is a mean over predicted tokens. language_modelling: coefficient of the cross-entropy. distillation:
    coefficient of T^2 KL(teacher || student) of the predicted distributions at temperature T (Hinton et al. 2015, arXiv
    1503.02531). temperature: T. hidden_states: coefficient of the squared difference between student and teacher in the
    output of each block, divided by the mean square of the teacher's output. budget: coefficient of the squared
    difference between the share of tokens that soft gates (which scale updates in training) let pass and the share that
    adapt.budget allows. teacher: a dense checkpoint with the same vocabulary; None means the source before adaptation.

    Raises ValueError for values out of range, if nothing would be learned, and for a teacher that no term uses.
    """

    language_modelling: float = 1.0
    distillation: float = 0.0
    temperature: float = 1.0
    hidden_states: float = 0.0
    budget: float = 1.0
    teacher: str | None = None

    def __post_init__(self) -> None:
        for name in ("language_modelling", "distillation", "hidden_states", "budget"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.temperature > 0:
            raise ValueError(f"temperature must be above 0, got {self.temperature}")
        if not self.language_modelling + self.distillation > 0:
            raise ValueError("language_modelling and distillation must not both be 0: nothing would be learned")
        if self.teacher is not None and not self.teaches:
            raise ValueError("teacher is named, but distillation and hidden_states are 0")

    @property
    def teaches(self) -> bool:
        """Whether any term of the loss needs a teacher, a dense model to distil from."""
        return self.distillation > 0 or self.hidden_states > 0


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Options of low-rank adapters (LoRA, arXiv 2106.09685) on every projection of every block, by PEFT.

    The adapters are merged into the weights when training ends. rank: rank of the adapters, at least 1. alpha: the
    adapters' output is scaled by alpha / rank. dropout: dropout probability for the adapters' inputs, in [0, 1). Raises
    ValueError for values out of range.
    """

    rank: int = 8
    alpha: float = 16.0
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be in [0, 1), got {self.dropout}")


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """The options of an adaptation, section `adapt` of its recipe: budget, stages, losses, and initial routers.

    train_only, router_learning_rate: defaults for stages that do not set them (router_learning_rate None means the
    stage's learning rate). stages: the stages, which are trained one after the other; if empty, there is a single stage
    of train.steps. loss: coefficients of the loss. lora: options of the adapters, for stages that train adapters.
    budget: forward FLOPs per token to execute, as a share of the dense source's, in (0, 1), for rows of data.context
    tokens; None means the compute that the mechanisms' own options lead to. start: random; or measured: a linear router
    of Mixture-of-Depths starts as a least-squares estimate of how much its block changes a token, and a low-rank skip
    path (which replaces the update of skipped tokens) as a least-squares estimate of that update. Both are measured on
    the source. calibration_rows: number of training rows (all, if there are fewer) on which blocks are scored and
    routers are started; thresholds are set on at most the first 32 of them. tolerance: the largest allowed difference
    between the logits of the routed model before training and those of the source, divided by the source's largest
    absolute logit. Raises ValueError for values out of range.
    """

    train_only: Trained = "all"
    router_learning_rate: float | None = None
    stages: list[Stage] = field(default_factory=list)
    loss: Loss = field(default_factory=Loss)
    lora: Lora = field(default_factory=Lora)
    budget: float | None = None
    start: Literal["random", "measured"] = "random"
    calibration_rows: int = 16
    tolerance: float = 1e-3

    def __post_init__(self) -> None:
        if self.budget is not None and not 0 < self.budget < 1:
            raise ValueError(f"budget must be in (0, 1), a share of the dense model's FLOPs, got {self.budget}")
        if self.calibration_rows < 1:
            raise ValueError(f"calibration_rows must be at least 1, got {self.calibration_rows}")
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be above 0, got {self.tolerance}")
        for name in ("router_learning_rate",):
            if (value := getattr(self, name)) is not None and not value > 0:
                raise ValueError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True, kw_only=True)
class AdaptRecipe(Recipe):
    """The definition of a whole adaptation of a dense checkpoint: a training recipe with the section `adapt`.

    model: may only set mechanisms, activation, neuron_groups and drop_layers; everything else is taken from the source.
    In `mechanisms`, `layers` may also be `{score: block_influence, count: N}`: the N blocks that change the residual
    stream least. `drop_layers` accepts the same forms as `layers` and removes whole blocks, which is a baseline that
    routing has to beat. adapt: budget of FLOPs, stages, losses and initial routers. Raises ValueError for other keys of
    `model`, for neuron groups chosen by a router, and for train.routing or train.no_decay other than the default.
    """

    adapt: AdaptConfig = field(default_factory=AdaptConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in self.model:
            if key not in MODEL_KEYS:
                raise ValueError(f"{unknown('key in model', key, MODEL_KEYS)}; all else is the source's")
        groups = self.model.get("neuron_groups") or {}
        if not isinstance(groups, Mapping):
            raise ValueError(f"model.neuron_groups must be a mapping, got {groups!r}")
        if (decision := groups.get("decision", "magnitude")) != "magnitude":
            raise ValueError(
                f"model.neuron_groups.decision must be 'magnitude' to adapt, got {decision!r}: the gains of a router "
                "would change what the source computes"
            )
        if self.train.routing != "learned":
            raise ValueError(f"train.routing must be 'learned' to adapt, got {self.train.routing!r}")
        if self.train.no_decay is not None:
            raise ValueError("train.no_decay has no effect here: matrices decay, biases, norms and adapters do not")


def read_recipe(values: PlainMapping) -> AdaptRecipe:
    """Parse a recipe for an adaptation from a plain dict, and complete its stages.

    Every field of the stages is filled in, and train.steps becomes the sum of their steps. values: the entries of the
    recipe's YAML file. Raises ValueError with one line per mistake; each line names the field and the allowed values.
    """
    parts = [values.get(name) or {} for name in ("train", "adapt")] if isinstance(values, Mapping) else []
    if not parts or not all(isinstance(part, Mapping) for part in parts):
        from_dict(AdaptRecipe, values)  # which says what is wrong
    values, train, stages = dict(values), dict(parts[0]), parts[1].get("stages")
    counts = [s.get("steps") for s in stages if isinstance(s, Mapping)] if isinstance(stages, list) else []
    total = sum(count for count in counts if type(count) is int)
    if stages and total:
        if train.get("steps", total) != total:
            raise ValueError(
                f"train.steps is {train['steps']}, but the stages have {total} steps together; leave it out"
            )
        train["steps"] = total
        if isinstance(warmup := train.get("warmup_steps", 0), int):  # each stage has its own, cut to its length below
            train["warmup_steps"] = min(warmup, total)
        values["train"] = train
    recipe = from_dict(AdaptRecipe, values)
    finite(recipe.adapt, "adapt")
    return replace(recipe, adapt=replace(recipe.adapt, stages=list(_stages(recipe))))


def _stages(recipe: AdaptRecipe) -> Any:
    train, adapt = recipe.train, recipe.adapt
    alone = Stage(steps=train.steps)
    for i, stage in enumerate(adapt.stages or [alone]):
        where = f"adapt.stages[{i}]"
        if stage.steps is None or stage.steps < 1:
            raise ValueError(f"{where}.steps must be at least 1, got {stage.steps}")
        rate = stage.learning_rate or train.learning_rate
        warmup = min(train.warmup_steps or 0, stage.steps) if stage.warmup_steps is None else stage.warmup_steps
        filled = replace(
            stage,
            train_only=stage.train_only or adapt.train_only,
            learning_rate=rate,
            router_learning_rate=stage.router_learning_rate or adapt.router_learning_rate or rate,
            warmup_steps=warmup,
            routing=stage.routing or "oracle",
        )
        if not 0 <= warmup <= stage.steps:
            raise ValueError(f"{where}.warmup_steps must be in [0, {stage.steps}], got {warmup}")
        if not min(filled.learning_rate or 0, filled.router_learning_rate or 0) > 0:
            raise ValueError(f"{where}: learning rates must be above 0")
        yield filled
