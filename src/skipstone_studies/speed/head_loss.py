"""A study of three ways to compute the cross-entropy of an output head over a large vocabulary: time and memory.

The ways are all logits at once, our loss in chunks of tokens (`ops/head_loss.py`), and PyTorch's
`torch.nn.functional.linear_cross_entropy` (2.13 or later).
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from skipstone.ops.head_loss import linear_cross_entropy, plain_linear_cross_entropy
from skipstone_studies.speed.interleaved import ratio, seconds, timed
from skipstone_studies.speed.resident import resident_peak
from skipstone_studies.study import Column, Figures, RecipeDict, Study

ALL = "all logits"
SIZE = {"vocabulary": 151_936, "tokens": 2048, "width": 1024, "rounds": 3}
KINDS: dict[str, int | None] = {ALL: None, "chunks of 256": 256, "chunks of 1024": 1024, "torch's": 0}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: one for each precision and way to compute a large head's loss.

    Each is a dict that `measured` takes. Precisions are "fp32" and "bf16" (autocast). scale: "laptop" or "paper";
    PyTorch's `linear_cross_entropy` takes minutes on a CPU, so only "paper" has it.
    """
    kinds = [kind for kind in KINDS if kind != "torch's" or scale == "paper"]
    return {f"{kind}, {p}": {**SIZE, "kind": kind, "precision": p} for p in ("fp32", "bf16") for kind in kinds}


def measured(recipe: RecipeDict) -> Figures:
    """Measure one way to compute the loss over a large vocabulary, forward and backward.

    recipe: an entry of `arms`, with the keys "kind", "precision", "tokens", "width", "vocabulary" and "rounds". Keys of
    the result: `loss` (mean over tokens, in nats), `gib` (peak memory beyond hidden states and weight, in GiB),
    `seconds` (median CPU seconds) and `time` (CPU seconds divided by those of computing all logits at once, as
    {"median", "min", "max"} over rounds).
    """
    given = inputs(recipe)
    kinds = (ALL, recipe["kind"])
    tasks = {kind: timed(partial(step, kind, given, recipe), time.process_time) for kind in kinds}
    loss = step(recipe["kind"], given, recipe) / recipe["tokens"]
    taken = seconds(tasks, recipe["rounds"])
    with multiprocessing.get_context("spawn").Pool(1) as pool:  # a new process, for its peak memory
        memory = pool.apply(memory_of, (recipe,))
    ours = taken[recipe["kind"]]
    return {"loss": loss, "gib": memory, "seconds": statistics.median(ours), "time": ratio(ours, taken[ALL])}


def inputs(recipe: RecipeDict) -> tuple[Tensor, Tensor, Tensor]:
    """Return random hidden states [tokens, width], head weight [vocabulary, width] and targets [tokens].

    recipe: has the keys "tokens", "width" and "vocabulary". The first two tensors are fp32 and require gradients;
    targets are int64.
    """
    torch.manual_seed(0)
    weight = torch.empty(recipe["vocabulary"], recipe["width"]).normal_(0, 0.02).requires_grad_()
    x = torch.randn(recipe["tokens"], recipe["width"]).requires_grad_()
    return x, weight, torch.randint(recipe["vocabulary"], (recipe["tokens"],))


def step(kind: str, given: tuple[Tensor, Tensor, Tensor], recipe: RecipeDict) -> float:
    """Run one forward and backward pass, and return the loss in nats, summed over tokens.

    kind: how the loss is computed, such as "all logits" or "chunks of 256" (a key of `KINDS`). given: the tensors that
    `inputs` returns. recipe: its "precision" is "fp32", or "bf16" for autocast.
    """
    for tensor in given[:2]:
        tensor.grad = None
    with torch.autocast("cpu", torch.bfloat16) if recipe["precision"] == "bf16" else nullcontext():
        found = _loss(kind)(*given)
    found.backward()
    return found.item()


def _loss(kind: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    chunk = KINDS[kind]
    if chunk is None:
        return plain_linear_cross_entropy
    if chunk:
        return lambda x, w, t: linear_cross_entropy(x, w, t, chunk)
    theirs = getattr(F, "linear_cross_entropy", None)
    if theirs is None:
        raise ValueError("torch.nn.functional has no linear_cross_entropy: torch 2.13 or later is needed")
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    return lambda x, w, t: theirs(x, w, t, reduction="sum", options=options)


def memory_of(recipe: RecipeDict) -> float:
    """Return the GiB by which computing the loss, forward and backward, raises this process's peak memory (Linux).

    recipe: an entry of `arms`, whose "kind" says how the loss is computed.
    """
    given = inputs(recipe)
    before = resident_peak()
    step(recipe["kind"], given, recipe)
    return (resident_peak() - before) / 2**30


HEAD_LOSS = Study(
    name="head_loss",
    purpose="The loss over a vocabulary of 151,936: memory and CPU time, all logits at once and in chunks",
    about=(
        "**Random weights and tokens.** Forward and backward of head and loss alone, for 2,048 tokens of width 1,024 "
        "and a hidden state that requires a gradient. *GiB* is the peak memory of a separate process beyond weight "
        "and hidden states, gradients included. CPU time is interleaved with the variant that computes all logits at "
        "once. bf16 means autocast over fp32 weights, as in `skipstone train`."
    ),
    arms=arms,
    seeds={"laptop": (0,), "paper": (0,)},
    clock=measured,
    columns=(
        Column(key="loss", title="loss", format=".6f"),
        Column(key="gib", title="GiB", format=".2f", better="low"),
        Column(key="seconds", title="CPU s", format=".2f"),
        Column(key="time", title="time / all logits (min to max)", format=".2f", spread=True),
    ),
)
