"""`TrainConfig` and `Recipe`: the definition of a training run, parsed strictly from plain dicts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal

from skipstone.core.strict import PlainDict, PlainMapping, from_dict, is_folder_name, unknown
from skipstone.data.config import DataConfig

# Kinds of parameters that weight decay may leave out (see decay.py). preferences: those of PolyGLU's neurons.
# embeddings: of tokens and positions, and a tied head. routers: all other parameters of mechanisms.
DECAY_KINDS = ("preferences", "biases", "norms", "embeddings", "routers")
LOGGERS = ("jsonl", "tensorboard", "trackio", "wandb")
# only affect what is written and compared, and when
NOT_THE_RESULT = (
    "save_every",
    "save_minutes",
    "keep_checkpoints",
    "keep_best",
    "compare_every",
    "max_skipped_steps",  # changes nothing up to the step at which the run would have stopped
)
# From this vocabulary on, the logits of a micro-batch are larger than the model's other tensors.
LARGE_VOCABULARY, LOSS_CHUNK = 65_536, 1024

# Larger values are typing mistakes: no machine has so many threads, and torch accepts no larger seed.
LARGEST = {
    "steps": 1 << 31,
    "batch_size": 1 << 24,
    "eval_batch_size": 1 << 24,
    "loss_chunk": 1 << 31,
    "threads": 4096,
    "seed": (1 << 32) - 1,
}


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """The options of a training: the section `train` of a recipe.

    The intervals (`eval_every`, `log_every`, `save_every`, `save_minutes`), `loggers` and what is stored do not change
    the result; all other options may. Options listed in `NOT_THE_RESULT` may differ between a run and its resumption.

    steps: number of optimizer steps. batch_size: rows of one optimizer step, over all processes and micro-batches.
    gradient_accumulation: micro-batches per step. It changes memory and not the result, except for what is measured on
    a micro-batch: the thresholds of `ema_threshold`, the targets of routers trained from the gradient at their block's
    output, the balancing loss of experts. The number of processes has the same effect.

    learning_rate: the peak, reached by a linear warm-up over warmup_steps (None means a tenth of the steps, at most
    100); it then decays by cosine to min_lr_ratio * learning_rate. router_learning_rate: the peak for all parameters of
    depth mechanisms (those that let tokens skip blocks); None means learning_rate. weight_decay, beta1, beta2: of
    AdamW. no_decay: kinds of parameters without weight decay, out of preferences (of PolyGLU's neurons), biases, norms,
    embeddings (with a tied head) and routers (all other parameters of mechanisms); None means preferences, biases and
    norms. The matrices of attention and MLP always decay. max_grad_norm: gradients are clipped to this norm; 0 disables
    clipping. average_last: share of the steps, at the end, over which all weights are averaged to give the trained
    model; 0 means the last step's weights.

    precision: fp32, or bf16 (autocast; weights and optimizer stay fp32). compile: apply torch.compile to each block.
    activation_checkpointing: recompute blocks in the backward pass instead of saving their intermediate tensors.
    loss_chunk: number of tokens whose logits exist at a time; 0 means all of them; None means 1,024 if the vocabulary
    has 65,536 tokens or more, else all. routing: learned (by the mechanisms), or difficulty: every block with a depth
    mechanism keeps exactly the tokens whose known `difficulty` is not negative (an upper bound for routers, on
    synthetic corpora that tell the difficulty, such as reset-s3).

    eval_every, log_every, save_every: steps between validations, log lines and checkpoints; 0 means only at the end
    (log_every is at least 1). save_minutes: also save a checkpoint when this many minutes have passed since the last
    one; None means that steps alone decide. eval_rows: number of validation rows; None means all of them.
    eval_batch_size: rows of a validation pass; None means as many as in a micro-batch. keep_checkpoints: how many of
    the newest checkpoints are stored. keep_best: also store the model with the lowest validation loss in RUN/best (the
    loss without access to later tokens if the model has one).

    seed: seed of weights, dropout and routing noise; `data.seed` draws the rows. threads: torch's CPU threads; None
    leaves the number unchanged. device: auto uses an accelerator if there is one. parallel: how several processes hold
    the model: ddp: each holds all of it; fsdp2: each holds a part of every parameter, of its gradient and of its
    optimizer state. compare_every: steps between checks that tensors which all processes hold are equal in all of them;
    0 means never. max_skipped_steps: how many steps of the training may be skipped because their loss, gradient or
    router scores are not finite; one more stops the training. loggers: where metrics are written, out of jsonl,
    tensorboard, trackio and wandb; metrics.jsonl is always written. Raises ValueError for values out of range and
    options that exclude each other.
    """

    steps: int = 1000
    batch_size: int = 16
    learning_rate: float = 1e-3
    router_learning_rate: float | None = None
    min_lr_ratio: float = 0.1
    warmup_steps: int | None = None
    weight_decay: float = 0.1
    no_decay: list[str] | None = None
    beta1: float = 0.9
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    average_last: float = 0.0
    gradient_accumulation: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    compile: bool = False
    activation_checkpointing: bool = False
    loss_chunk: int | None = None
    routing: Literal["learned", "difficulty"] = "learned"
    eval_every: int = 200
    eval_rows: int | None = None
    eval_batch_size: int | None = None
    log_every: int = 10
    save_every: int = 500
    save_minutes: float | None = None
    keep_checkpoints: int = 2
    keep_best: bool = False
    seed: int = 0
    threads: int | None = None
    device: Literal["auto", "cpu"] = "auto"
    parallel: Literal["ddp", "fsdp2"] = "ddp"
    compare_every: int = 100
    max_skipped_steps: int = 0
    loggers: list[str] = field(default_factory=lambda: ["jsonl"])

    def __post_init__(self) -> None:
        at_least_one = ("steps", "batch_size", "gradient_accumulation", "log_every", "keep_checkpoints")
        for name in (*at_least_one, "eval_rows", "eval_batch_size", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        for name in (
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "eval_every",
            "save_every",
            "seed",
            "loss_chunk",
            "compare_every",
            "max_skipped_steps",
        ):
            if not (getattr(self, name) or 0) >= 0:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if self.weight_decay == float("inf"):
            raise ValueError("weight_decay must be finite, got inf")
        for name, most in LARGEST.items():
            if (getattr(self, name) or 0) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name):,}")
        if self.save_minutes is not None and not self.save_minutes > 0:
            raise ValueError(f"save_minutes must be above 0, got {self.save_minutes}")
        if self.warmup_steps is None:
            object.__setattr__(self, "warmup_steps", min(100, self.steps // 10))
        self._check_shares()
        self._check_relations()

    def _check_shares(self) -> None:
        if not 0 < self.learning_rate < float("inf"):
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if self.router_learning_rate is not None and not 0 < self.router_learning_rate < float("inf"):
            raise ValueError(f"router_learning_rate must be above 0, got {self.router_learning_rate}")
        if not 0 <= self.min_lr_ratio <= 1:
            raise ValueError(f"min_lr_ratio must be in [0, 1], got {self.min_lr_ratio}")
        if not 0 <= self.average_last < 1:
            raise ValueError(f"average_last must be in [0, 1), got {self.average_last}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be in [0, 1), got {getattr(self, name)}")

    @property
    def averaged_steps(self) -> int:
        """The number of last steps whose weights are averaged; 0 if there are none."""
        return max(1, round(self.average_last * self.steps)) if self.average_last else 0

    def loss_chunk_of(self, vocab_size: int) -> int:
        """Return how many tokens' logits the loss computes at a time for a vocabulary of `vocab_size` tokens.

        The result is `loss_chunk` if that is set, else 1,024 for a vocabulary of at least 65,536 tokens and 0 for
        smaller ones; 0 means that all logits are computed at once.
        """
        if self.loss_chunk is not None:
            return self.loss_chunk
        return LOSS_CHUNK if vocab_size >= LARGE_VOCABULARY else 0

    def _check_relations(self) -> None:
        if (self.warmup_steps or 0) > self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must not exceed steps ({self.steps})")
        if self.batch_size % self.gradient_accumulation:
            raise ValueError(
                f"batch_size ({self.batch_size}) must be a multiple of gradient_accumulation "
                f"({self.gradient_accumulation}): it counts the rows of a whole optimizer step"
            )
        if self.keep_best and self.parallel == "fsdp2":
            raise ValueError("keep_best needs parallel ddp: under fsdp2 no process has a whole model to save")
        if self.average_last and self.parallel == "fsdp2":
            raise ValueError("average_last needs parallel ddp: under fsdp2 the mean of the weights is not kept")
        for kind in self.no_decay or ():
            if kind not in DECAY_KINDS:
                raise ValueError(unknown("no_decay", kind, DECAY_KINDS))
        for name in self.loggers:
            if name not in LOGGERS:
                raise ValueError(unknown("loggers", name, LOGGERS))


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """The definition of a whole training run, as a recipe file contains it.

    name: name of the default run folder, runs/NAME; None means a name from corpus and time. model: fields of
    SkipstoneConfig, or {preset: NAME} with fields that differ from the preset. data: which text or synthetic task is
    read, and how. train: the options of the training. Raises ValueError for a name that is not that of a folder, and
    for routing "difficulty" (blocks keep the tokens known to need depth) with data that do not mark them.
    """

    name: str | None = None
    model: PlainDict = field(default_factory=dict)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if self.name is not None and not is_folder_name(self.name):
            raise ValueError(f"name must be the name of a folder, got {self.name!r}")
        if self.train.routing == "difficulty" and not self.data.tells_difficulty:
            raise ValueError(
                "train.routing 'difficulty' needs a corpus of known difficulty (reset-s3, switched-s3, mixed), "
                f"got {self.data.corpus!r}"
            )


def read_recipe(values: PlainMapping) -> Recipe:
    """Parse a recipe from a plain dict.

    values: a dict with the keys name, model, data and train, each optional, as in a recipe's YAML file. Raises
    ValueError with one line per mistake; each line names the field and the allowed values.
    """
    if isinstance(values, Mapping) and "arms" in values:
        raise ValueError("a recipe with arms is a comparison: run it by `skipstone isoflop`, or leave arms out")
    return from_dict(Recipe, values)


def to_dict(recipe: Recipe) -> PlainDict:
    """Return a recipe as nested plain values: the sections `model`, `data` and `train`, and `name` if there is one."""
    return {key: value for key, value in asdict(recipe).items() if value is not None}
