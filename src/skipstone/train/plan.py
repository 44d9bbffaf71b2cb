"""Plan a training on many GPUs in advance: memory of each, bytes between them, FLOPs, hours, and what does not fit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from skipstone.core.strict import PlainMapping
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.train.estimate import FP32, GPUS, MFU, STATE, UPDATE, Estimate, estimate, gigabytes, known, passing
from skipstone.train.recipe import TrainConfig, read_recipe
from skipstone.train.setup import model_config

GPUS_OF_NODE = 8
NETWORK = 50.0  # GB/s a GPU between nodes: an assumption, one adapter of 400 Gb/s for each
FRAGMENTATION = 0.05  # an assumption: the share of a GPU's memory that an allocator cannot give out


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """The estimated memory, messages and time of a training on several GPUs; the figures are for each GPU.

    gpu: name of the GPU, a key of `estimate.GPUS`. gpus: number of GPUs. parallel: ddp (replicated) or fsdp2 (sharded).
    rows: rows of a micro-batch on each GPU. whole: the estimate for the whole training on one GPU. memory: bytes by
    purpose, such as "weights" or "activations"; None where the size depends on the values of tokens. sent: bytes that
    each GPU sends in an optimizer step, by kind of message. link: GB/s in one direction over the slowest link between
    GPUs. compute, communication, update: seconds of an optimizer step for matrix products, messages, and AdamW.
    """

    gpu: str
    gpus: int
    parallel: str
    rows: int
    whole: Estimate
    memory: Mapping[str, float | None]
    sent: Mapping[str, float]
    link: float
    compute: float
    communication: float
    update: float

    @property
    def seconds(self) -> float:
        """The estimated seconds of an optimizer step, if messages are sent while gradients are computed."""
        return max(self.compute, self.communication) + self.update

    @property
    def hours(self) -> float:
        """The estimated hours of the whole training: `seconds` times the number of optimizer steps."""
        return self.whole.steps * self.seconds / 3600

    @property
    def known_memory(self) -> float:
        """The sum of `memory` in bytes, without purposes whose size is not known."""
        return sum(size for size in self.memory.values() if size is not None)

    @property
    def fits(self) -> bool:
        """Whether the known part of the memory fits into one GPU."""
        return self.known_memory <= GPUS[self.gpu].memory * 1e9

    def lines(self) -> list[str]:
        """Return the plan as text, one figure per line, with what was assumed."""
        card, whole = GPUS[self.gpu], self.whole
        missing = ", and what is not known" if None in self.memory.values() else ""
        tokens, speed = whole.steps * whole.tokens_per_step, whole.tokens_per_step / self.seconds
        products = f"{whole.mfu:.0%} of {card.flops / 1e12:,.0f} TFLOP/s in bf16"
        times = (self.compute, self.communication, self.update)
        told = ("products", "messages beside them", "AdamW")
        return [
            f"parameters   {whole.parameters:,}",
            f"tokens       {tokens:,} in {whole.steps:,} steps of {whole.tokens_per_step:,}",
            f"FLOPs        {whole.flops:.3e}",
            f"on           {self.gpus:,} {self.gpu} by {self.parallel}, {self.rows} rows a micro-batch on each",
            *(f"memory       {gigabytes(size):>11}  {name}" for name, size in self.memory.items()),
            f"memory       {gigabytes(self.known_memory):>11}  in all{missing}; each GPU has {card.memory:.0f} GB",
            *(f"sent         {gigabytes(size):>11}  {name}, by each GPU in a step" for name, size in self.sent.items()),
            "step         " + ", ".join(f"{time:,.3f} s of {what}" for time, what in zip(times, told, strict=True)),
            f"checkpoint   {gigabytes(whole.checkpoint):>11}  on disk, each",
            f"time         {self.hours:,.1f} hours, {self.hours * self.gpus:,.0f} GPU hours, {speed:,.0f} tokens/s",
            f"assumed      {products}, {self.link:,.0f} GB/s between GPUs, {FRAGMENTATION:.0%} lost to fragments",
            "left out     validation, saving, starting, waiting for the slowest GPU",
            *(self._advice() if not self.fits else []),
        ]

    def _advice(self) -> list[str]:
        """Name what does not fit and what would help."""
        known_parts = {name: size for name, size in self.memory.items() if size is not None}
        largest = max(known_parts, key=lambda name: known_parts[name])
        tries = []
        if self.parallel == "ddp" and self.gpus > 1:
            tries.append("train.parallel=fsdp2")
        if self.rows > 1:
            tries.append("a larger train.gradient_accumulation")
        tries += ["train.activation_checkpointing=true", "more GPUs" if self.parallel == "fsdp2" else "larger GPUs"]
        over = self.known_memory - GPUS[self.gpu].memory * 1e9
        return [f"DOES NOT FIT {gigabytes(over)} too much, most of it {largest}; try {', '.join(tries)}"]


def plan(
    values: PlainMapping, gpus: int, gpu: str = "H100", mfu: float = MFU, network: float = NETWORK
) -> TrainingPlan:
    """Plan the training of a recipe on several GPUs, in nodes of 8; no weights are allocated.

    values: the recipe as a plain dict with the keys name, model, data and train. gpus: number of GPUs. gpu: name of the
    GPU, such as "H100"; one of `estimate.GPUS`. mfu: share of the GPU's peak FLOP/s that matrix products reach, in (0,
    1]. network: GB/s in one direction that each GPU has to other nodes. Returns memory, bytes sent and seconds of a
    step for each GPU. Raises ValueError if the rows of a step cannot be divided over the GPUs, for an unknown GPU, an
    mfu out of range, mistakes in the recipe, and if `gpus` or `network` is not positive.
    """
    if gpus < 1 or not 0 < network < math.inf:
        raise ValueError(f"gpus and network must be above 0, got {gpus} and {network}")
    recipe = read_recipe(values)
    train = recipe.train
    rows, rest = divmod(train.batch_size, train.gradient_accumulation * gpus)
    if rest:
        raise ValueError(
            f"train.batch_size ({train.batch_size}) must be a multiple of gradient_accumulation "
            f"({train.gradient_accumulation}) times the number of GPUs ({gpus})"
        )
    whole = estimate(values, gpu, mfu)
    config = model_config(recipe.model, recipe.data.context, known(recipe))
    with torch.device("meta"):
        model = SkipstoneForCausalLM(config)
    sizes = ParameterCounts.of(model)
    sharded = train.parallel == "fsdp2"
    state = _state(sizes, gpus, train)
    own = replace(recipe, train=replace(train, batch_size=rows * train.gradient_accumulation))
    memory: dict[str, float | None] = {**state, **passing(config, own)}
    memory["fragmentation"] = FRAGMENTATION * sum(size for size in memory.values() if size is not None)
    sent = messages(sizes, gpus, train)
    card = GPUS[gpu]
    link = card.link if gpus <= GPUS_OF_NODE else min(card.link, network)
    updated = sizes.total / (gpus if sharded else 1)
    return TrainingPlan(
        gpu=gpu,
        gpus=gpus,
        parallel=train.parallel,
        rows=rows,
        whole=whole,
        memory=memory,
        sent=sent,
        link=link,
        compute=whole.flops / whole.steps / gpus / (mfu * card.flops),
        communication=sum(sent.values()) / (link * 1e9),
        update=UPDATE * updated / (card.bandwidth * 1e9),
    )


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Numbers of parameters of a model.

    total: number of parameters in the whole model. blocks: number in all blocks together. largest: number in the
    largest block.
    """

    total: int
    blocks: int
    largest: int

    @classmethod
    def of(cls, model: SkipstoneForCausalLM) -> ParameterCounts:
        """Return the numbers of parameters of a model, which may be on the meta device."""
        blocks = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
        total = sum(p.numel() for p in model.parameters())
        return cls(total=total, blocks=sum(blocks), largest=max(blocks))


def _state(sizes: ParameterCounts, gpus: int, train: TrainConfig) -> dict[str, float | None]:
    """Return the bytes on each GPU by purpose: weights, gradients, optimizer state, and temporary copies.

    sizes: numbers of parameters of the model. gpus: number of GPUs. train: the training options, for `parallel` and
    `gradient_accumulation`.
    """
    share = gpus if train.parallel == "fsdp2" else 1
    found: dict[str, float | None] = {name: size * sizes.total / share for name, size in STATE.items()}
    if train.parallel == "fsdp2":
        outside = sizes.total - sizes.blocks  # gathered once, until the end of the backward pass
        # two gathered blocks, one of them ahead of its use; a block's gradient, and its copy that is being reduced
        found["gathered weights"] = FP32 * (outside + 2 * sizes.largest)
        late = train.gradient_accumulation > 1  # whole gradients wait for the last micro-batch
        found["whole gradients"] = FP32 * (sizes.total if late else outside + 2 * sizes.largest)
    elif gpus > 1:
        found["buckets of gradients"] = FP32 * sizes.total
    return found


def messages(sizes: ParameterCounts, gpus: int, train: TrainConfig) -> dict[str, float]:
    """Return the bytes that each GPU sends in an optimizer step with ring algorithms, by kind of message.

    The kinds are "all-reduce of gradients" for ddp, and "all-gather of weights" and "reduce-scatter of gradients" for
    fsdp2. sizes: parameter counts of the model. gpus: number of GPUs. train: the training options, for `parallel` and
    `gradient_accumulation`. Thresholds and comparisons of replicas, a few bytes for each block, are left out.
    """
    part = (gpus - 1) / gpus
    if train.parallel == "ddp":
        return {"all-reduce of gradients": 2 * part * FP32 * sizes.total}
    gathered = 2 * sizes.blocks + (sizes.total - sizes.blocks)  # blocks in the forward and in the backward pass
    return {
        "all-gather of weights": part * FP32 * gathered * train.gradient_accumulation,
        "reduce-scatter of gradients": part * FP32 * sizes.total,
    }
