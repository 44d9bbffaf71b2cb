"""A study of the time of a mixture of experts, forward and backward, beside the dense MLP of equal FLOPs per token.

All in fp32, and the MLP alone, including its balancing loss. The arms (compared implementations) named `mixtral` are
transformers' `MixtralSparseMoeBlock`, with its loop over experts (eager) and with its grouped products (grouped_mm); it
computes no balancing loss. In the arm with no-ops, half as many no-ops (choices that compute nothing) as experts can be
chosen, and each equally often.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from skipstone.core.tokens import Tokens
from skipstone.nn.experts import ExpertsMLP
from skipstone.nn.mlp import FixedActivation, GatedMLP
from skipstone_studies.speed.interleaved import ratio, seconds, timed
from skipstone_studies.study import Column, Figures, RecipeDict, Study

KINDS = ("experts", "experts and no-ops", "mixtral, eager", "mixtral, grouped_mm")
SIZE = {"tokens": 4096, "experts": 8, "top_k": 2, "rounds": 15}
Step = Callable[[Tensor], Tensor]


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: one for each width and implementation of a mixture of experts.

    Each is a dict that `measured` takes. scale: not used.
    """
    return {f"width {width}, {kind}": {"width": width, "kind": kind, **SIZE} for width in (256, 512) for kind in KINDS}


def measured(recipe: RecipeDict) -> Figures:
    """Time forward and backward pass of one implementation of a mixture of experts, in turns with a dense MLP.

    recipe: an entry of `arms` with a key "seed"; its "kind" names the implementation. The result is {"seconds": the
    median CPU seconds, "time": CPU seconds divided by those of the dense MLP, as {"median", "min", "max"} over rounds}.
    """
    torch.manual_seed(recipe["seed"])
    x_BTD = torch.randn(1, recipe["tokens"], recipe["width"], requires_grad=True)

    def task(kind: str) -> Callable[[], None]:
        module, step = _built(kind, recipe)

        def run() -> None:
            module.zero_grad(set_to_none=True)
            x_BTD.grad = None
            step(x_BTD).backward()

        return run

    kinds = ("dense", recipe["kind"])
    taken = seconds({kind: timed(task(kind), time.process_time) for kind in kinds}, recipe["rounds"])
    ours, dense = taken[recipe["kind"]], taken["dense"]
    return {"seconds": statistics.median(ours), "time": ratio(ours, dense)}


def _built(kind: str, recipe: RecipeDict) -> tuple[nn.Module, Step]:
    width, count, top_k = recipe["width"], recipe["experts"], recipe["top_k"]
    neurons = -(-8 * width // (3 * 8 * top_k)) * 8 * top_k
    if kind.startswith("mixtral"):
        return _mixtral(width, neurons // top_k, count, top_k, kind.partition(", ")[2])
    slot, silu = torch.arange(recipe["tokens"])[None], FixedActivation("silu")
    tokens = Tokens(slot_BT=slot, position_BT=slot)
    options = {"count": count, "top_k": top_k, "no_op": count // 2 if kind.endswith("no-ops") else 0}
    dense = kind == "dense"
    mlp = GatedMLP(width, neurons, silu) if dense else ExpertsMLP(width, neurons, silu, **options)

    def step(x_BTD: Tensor) -> Tensor:
        y_BTD, records = mlp(x_BTD, tokens)
        return y_BTD.square().sum() + sum(record.loss_BT.sum() for record in records.values())

    return mlp, step


def _mixtral(width: int, neurons: int, count: int, top_k: int, kind: str) -> tuple[nn.Module, Step]:
    config = MixtralConfig(
        hidden_size=width, intermediate_size=neurons, num_local_experts=count, num_experts_per_tok=top_k
    )
    config._experts_implementation = kind
    block = MixtralSparseMoeBlock(config)
    for parameter in block.parameters():
        nn.init.normal_(parameter, 0.0, 0.02)
    return block, lambda x_BTD: block(x_BTD).square().sum()


EXPERTS = Study(
    name="experts",
    purpose="A mixture of experts and Mixtral's block against the dense MLP of equal FLOPs per token: CPU time",
    about=(
        "**Random weights.** Forward and backward of the MLP alone in fp32 on 4,096 tokens, balancing loss included. "
        "There are 8 experts, 2 for each token, and the neurons of the dense MLP are divided among the two. *mixtral* "
        "is transformers' own block, which computes no balancing loss. CPU time of the process, interleaved with the "
        "dense MLP."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="seconds", title="CPU ms per step", format=".0f", unit=1e-3),
        Column(key="time", title="time / dense (min to max)", format=".2f", spread=True),
    ),
)
