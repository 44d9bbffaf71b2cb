"""Estimate the cost of a training in advance: FLOPs, memory and hours on a named GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict, PlainMapping, choose
from skipstone.data.prepare import prepare
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.cost import cost
from skipstone.train import setup
from skipstone.train.recipe import Recipe, read_recipe

MFU = 0.4  # an assumption: what well-tuned dense training reaches on one GPU
FP32, BF16 = 4, 2  # bytes
STATE = {"weights": FP32, "gradients": FP32, "AdamW": 2 * FP32}  # bytes per parameter; fp32 also under autocast
UPDATE = 7 * FP32  # bytes per parameter that AdamW moves: it reads four numbers and writes three
SMALL, LARGE = 16, 32  # tokens of the two passes from which activations are extrapolated
_MEASURED: dict[tuple[str, str | None, bool], tuple[float, float]] = {}  # results of `_kept`: a plan asks twice


@dataclass(frozen=True, kw_only=True)
class Gpu:
    """A GPU's data sheet figures.

    flops: peak FLOP/s of dense bf16 matrix products with fp32 accumulation. memory: memory size in GB. bandwidth:
    memory bandwidth, in GB/s. link: bandwidth to the node's other GPUs, in GB/s in one direction.
    """

    flops: float
    memory: float
    bandwidth: float
    link: float


GPUS: dict[str, Gpu] = {
    "A100-40": Gpu(flops=312e12, memory=40, bandwidth=1555, link=300),
    "A100": Gpu(flops=312e12, memory=80, bandwidth=2039, link=300),
    "H100-PCIe": Gpu(flops=756e12, memory=80, bandwidth=2000, link=64),
    "H100": Gpu(flops=989e12, memory=80, bandwidth=3350, link=450),
    "H200": Gpu(flops=989e12, memory=141, bandwidth=4800, link=450),
    "B200": Gpu(flops=2250e12, memory=180, bandwidth=8000, link=900),
    "L4": Gpu(flops=121e12, memory=24, bandwidth=300, link=32),
    "L40S": Gpu(flops=362e12, memory=48, bandwidth=864, link=32),
    "RTX3090": Gpu(flops=71e12, memory=24, bandwidth=936, link=32),
    "RTX4090": Gpu(flops=165e12, memory=24, bandwidth=1008, link=32),
    "MI300X": Gpu(flops=1307e12, memory=192, bandwidth=5300, link=448),
}


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """The estimated cost of a training on one GPU, without validation and saving.

    gpu: name of the GPU, a key of `GPUS`. mfu: assumed share of the GPU's peak FLOP/s that is reached. parameters:
    number of parameters. steps: number of optimizer steps. tokens_per_step: tokens of one optimizer step. flops: FLOPs
    of the whole training, recomputation by activation checkpointing included. memory: bytes by purpose ("weights",
    "gradients", "AdamW", "copies of the weights", "activations", "logits"); None where the size depends on the values
    of tokens. seconds: time of one optimizer step. checkpoint: bytes of one checkpoint on disk.
    """

    gpu: str
    mfu: float
    parameters: int
    steps: int
    tokens_per_step: int
    flops: float
    memory: Mapping[str, float | None]
    seconds: float
    checkpoint: float

    @property
    def hours(self) -> float:
        """The estimated hours that all optimizer steps take together."""
        return self.steps * self.seconds / 3600

    def lines(self) -> list[str]:
        """Return the estimate as text, one figure per line, with the assumptions."""
        card, tokens = GPUS[self.gpu], self.steps * self.tokens_per_step
        found = [size for size in self.memory.values() if size is not None]
        speed = self.tokens_per_step / self.seconds
        more = "" if len(found) == len(self.memory) else ", and what is not known"
        return [
            f"parameters   {self.parameters:,}",
            f"tokens       {tokens:,} in {self.steps:,} steps of {self.tokens_per_step:,}",
            f"FLOPs        {self.flops:.3e}, {self.flops / tokens:.3e} a token",
            *(f"memory       {gigabytes(size):>9}  {name}" for name, size in self.memory.items()),
            f"memory       {gigabytes(sum(found)):>9}  in all{more}; the GPU has {card.memory:.0f} GB",
            f"checkpoint   {gigabytes(self.checkpoint):>9}  on disk, each",
            f"time         {self.hours:,.1f} hours on one {self.gpu}, {speed:,.0f} tokens/s",
            f"assumed      {self.mfu:.0%} of {card.flops / 1e12:,.0f} TFLOP/s in bf16",
            f"assumed      AdamW at the memory's {card.bandwidth:,.0f} GB/s",
            "left out     validation, saving",
        ]


def gigabytes(size: float | None) -> str:
    """Return `size` in bytes as text in GB, such as "1.50 GB"; "not known" for None."""
    return "not known" if size is None else f"{size / 1e9:.2f} GB"


def estimate(values: PlainMapping, gpu: str = "H100", mfu: float = MFU) -> Estimate:
    """Estimate the cost of training a recipe on one GPU, without training and without allocating weights.

    values: the recipe as a plain dict. gpu: name of the GPU, such as "H100"; one of `GPUS`. mfu: share of the GPU's
    peak FLOP/s that training reaches, in (0, 1]. Data are read only if the recipe sets neither a preset nor the
    vocabulary. Raises ValueError for an unknown GPU, an mfu outside (0, 1], and mistakes in the recipe.
    """
    card = choose("gpu", gpu, GPUS)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu must be in (0, 1], got {mfu}")
    recipe = read_recipe(values)
    config = setup.model_config(recipe.model, recipe.data.context, known(recipe))
    with torch.device("meta"):
        model = SkipstoneForCausalLM(config)
    train, context = recipe.train, recipe.data.context
    found = cost(model, tokens=context, routing="oracle")
    flops = found.training.total
    if train.activation_checkpointing:
        flops += found.forward.total - found.forward.head
    parameters = found.parameters.total
    flops_per_step = flops * train.batch_size
    return Estimate(
        gpu=gpu,
        mfu=mfu,
        parameters=parameters,
        steps=train.steps,
        tokens_per_step=train.batch_size * context,
        flops=flops_per_step * train.steps,
        memory={name: size * parameters for name, size in STATE.items()} | passing(config, recipe),
        seconds=flops_per_step / (mfu * card.flops) + UPDATE * parameters / (card.bandwidth * 1e9),
        checkpoint=parameters * (FP32 + STATE["AdamW"]),
    )


def known(recipe: Recipe) -> PlainDict:
    """Return the model options that follow from a recipe's data.

    Keys: `vocab_size`; with text also `tokenizer` (the object), `eos_token_id`, `bos_token_id` and `pad_token_id`. If
    the recipe names a preset or sets the vocabulary size itself, the dict is empty and no data are read.
    """
    if {"preset", "vocab_size"} & recipe.model.keys():
        return {}
    return setup.data_defaults(prepare(recipe.data, train=False))


def passing(config: SkipstoneConfig, recipe: Recipe) -> dict[str, float | None]:
    """Return the bytes of GPU memory that the forward pass of one micro-batch holds for the backward pass, by purpose.

    config: the model's configuration. recipe: the recipe, for batch size, context, precision, chunked loss and
    activation checkpointing. Keys: `copies of the weights` (saved tensors whose size does not depend on the number of
    tokens), `activations` (those whose size does) and `logits` (with their gradient). If sizes depend on the values of
    tokens, there are only `activations`, which is None, and `logits`.
    """
    train = recipe.train
    tokens = train.batch_size // train.gradient_accumulation * recipe.data.context
    chunk = train.loss_chunk_of(config.vocab_size)
    bf16 = train.precision == "bf16"
    # At the same time: logits and their gradient in the dtype of the products, and one fp32 tensor (three unchunked).
    logits = config.vocab_size * (
        min(chunk, tokens) * (2 * BF16 * bf16 + FP32) if chunk else tokens * (BF16 * bf16 + 3 * FP32)
    )
    try:
        fixed, each = _kept(config, recipe)
    except RuntimeError:  # the saved tensors depend on the values of tokens
        return {"activations": None, "logits": logits}
    if train.activation_checkpointing:  # inputs of all blocks, and one recomputed block
        each = config.num_hidden_layers * config.hidden_size * FP32 + each / config.num_hidden_layers
    return {"copies of the weights": fixed, "activations": each * tokens, "logits": logits}


def _kept(config: SkipstoneConfig, recipe: Recipe) -> tuple[float, float]:
    """Return the bytes that blocks save for the backward pass: a constant, and bytes per token of a row.

    They are measured in two short passes of the model on a CPU with fake tensors. Masks of packed rows, which grow with
    the square of the row, are left out. config: the model's configuration. recipe: the recipe, for the precision.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    bf16 = recipe.train.precision == "bf16"
    key = (config.to_json_string(use_diff=False), config._attn_implementation, bf16)
    if key not in _MEASURED:
        with FakeTensorMode(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the pass has no loss, which would otherwise be a reason to warn
            decoder = SkipstoneForCausalLM(config).train().model
            small, large = (_bytes(decoder, tokens, bf16) for tokens in (SMALL, LARGE))
        each = (large - small) / (LARGE - SMALL)
        _MEASURED[key] = small - SMALL * each, each
    return _MEASURED[key]


def _bytes(decoder: Any, tokens: int, bf16: bool) -> int:
    """Return the bytes of the tensors that a forward pass of one row saves for the backward pass.

    decoder: the model without its head, in a mode of fake tensors. tokens: tokens of the row. bf16: whether autocast is
    on.
    """
    own = {tensor.untyped_storage()._cdata for tensor in (*decoder.parameters(), *decoder.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # keep it alive, or its address could be reused
        return tensor

    unpack: Callable[[Tensor], Tensor] = lambda tensor: tensor  # noqa: E731
    with torch.autograd.graph.saved_tensors_hooks(pack, unpack), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        out = decoder(torch.zeros(1, tokens, dtype=torch.long), use_cache=False)
    del out
    return sum(storage.nbytes() for storage in kept.values())
