"""A study of the time of an MLP with neuron groups, compared with whole and with narrower SwiGLU MLPs.

Neuron groups are groups of an MLP's neurons, of which a router multiplies only some for each chunk of tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict
from skipstone.core.tokens import Tokens
from skipstone.measure.flops import count_flops
from skipstone.mechanisms.neuron_groups import NeuronGroups
from skipstone.nn.grouped_mlp import GroupedMLP
from skipstone.nn.mlp import FixedActivation, GatedMLP
from skipstone_studies.speed.interleaved import ratio, seconds, timed
from skipstone_studies.study import Column, Figures, RecipeDict, Study

WIDTHS, SHARES, CHUNKS, ROUNDS = (256, 512), (0.6, 0.4), (64, 256), 7
GROUP, BLOCKS, STEPS = 64, 4, 64
Run = Callable[[], object]


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: training steps of an MLP, and decoding by a whole model.

    Each is a dict that `measured` takes. They differ in the width, in the share of the MLP's neurons that are on
    (multiplied), and, in training, in the chunk, which is the number of neighbouring tokens that share one decision.
    scale: not used.
    """
    found: dict[str, RecipeDict] = {}
    for part, chunks in (("training", CHUNKS), ("decoding", CHUNKS[:1])):
        for width in WIDTHS:
            for share in SHARES:
                for chunk in chunks:
                    case = {"part": part, "width": width, "share": share, "chunk": chunk, "rounds": ROUNDS}
                    found[f"{part}, width {width}, {share:g} on, chunk {chunk}"] = {**case, "row": 512, "rows": 4}
    return found


def measured(recipe: RecipeDict) -> Figures:
    """Time an MLP with neuron groups, and a SwiGLU with as many neurons as are on, in turns with the whole SwiGLU.

    A router lets only some groups of the neurons be multiplied: those that are on. recipe: an entry of `arms` with a
    key "seed". The result is {"time": {"groups", "narrow"}}, CPU seconds of each divided by those of the whole SwiGLU,
    as {"median", "min", "max"} over rounds; in training also "flops", the counted FLOPs of the groups divided by those
    of the SwiGLU.
    """
    torch.manual_seed(recipe["seed"])
    return (_training if recipe["part"] == "training" else _decoding)(recipe)


def _training(recipe: RecipeDict) -> Figures:
    width, silu = recipe["width"], FixedActivation("silu")
    x_BTD = torch.randn(recipe["rows"], recipe["row"], width, requires_grad=True)
    neurons, kept = _neurons(recipe)
    options = {"group_size": GROUP, "capacity": recipe["share"], "chunk_size": recipe["chunk"]}
    runs = {
        "SwiGLU": _step(GatedMLP(width, neurons, silu), x_BTD),
        "narrow": _step(GatedMLP(width, kept, silu), x_BTD),
        "groups": _step(GroupedMLP(width, neurons, silu, NeuronGroups(width, neurons, **options)), x_BTD),
    }
    flops = {name: count_flops(run).total for name, run in runs.items()}  # type: ignore[arg-type]
    return {"flops": flops["groups"] / flops["SwiGLU"], "time": _cpu_time(runs, recipe["rounds"])}


def _decoding(recipe: RecipeDict) -> Figures:
    width = recipe["width"]
    neurons, kept = _neurons(recipe)
    groups = {"group_size": GROUP, "capacity": recipe["share"], "chunk_size": recipe["chunk"]}
    values = {"hidden_size": width, "num_hidden_layers": BLOCKS, "num_attention_heads": max(1, width // 64)}
    options: dict[str, PlainDict] = {
        "SwiGLU": {"intermediate_size": neurons},
        "narrow": {"intermediate_size": kept},
        "groups": {"intermediate_size": neurons, "neuron_groups": groups},
    }
    models = {name: SkipstoneForCausalLM(SkipstoneConfig(**values, **more)).eval() for name, more in options.items()}
    return {"time": _cpu_time({name: _decode(model) for name, model in models.items()}, recipe["rounds"])}


def _neurons(recipe: RecipeDict) -> tuple[int, int]:
    """Return the number of neurons of the MLP, four times its width, and how many of them are on, in whole groups."""
    neurons = 4 * recipe["width"]
    return neurons, int(neurons / GROUP * recipe["share"] + 1e-9) * GROUP


def _cpu_time(runs: Mapping[str, Run], rounds: int) -> Figures:
    """Return the CPU seconds of "groups" and "narrow" divided by those of "SwiGLU", which are timed in turns."""
    taken = seconds({name: timed(run, time.process_time) for name, run in runs.items()}, rounds)
    return {name: ratio(taken[name], taken["SwiGLU"]) for name in ("groups", "narrow")}


def _step(mlp: Any, x_BTD: Tensor) -> Run:
    slot = torch.arange(x_BTD.shape[1])[None]
    tokens = Tokens(slot_BT=slot, position_BT=slot)

    def run() -> None:
        mlp.zero_grad(set_to_none=True)
        x_BTD.grad = None
        mlp(x_BTD, tokens)[0].square().sum().backward()

    return run


def _decode(model: SkipstoneForCausalLM) -> Run:
    token_T = torch.randint(0, 256, (STEPS,), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run() -> None:
        cache = DynamicCache(config=model.config)
        for token in token_T:
            model(token.view(1, 1), past_key_values=cache)

    return run


FFN_GROUPS_COST = Study(
    name="ffn_groups_cost",
    purpose="Neuron groups against SwiGLU: CPU time of a training step of the MLP, and of decoding",
    about=(
        "**Random weights** with an untrained router, so decisions differ from chunk to chunk. Training: forward and "
        "backward of one MLP in fp32, 2,048 tokens in rows of 512. Decoding: one token of one row through a whole "
        f"model of {BLOCKS} blocks with a cache, {STEPS} steps. Times are CPU times of the process, interleaved, "
        "relative to SwiGLU; *narrow* is a SwiGLU with as many neurons as are on. FLOPs are counted while they "
        "execute."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="flops", title="FLOPs, groups", format=".2f"),
        Column(key="time.groups", title="time, groups", format=".2f", spread=True),
        Column(key="time.narrow", title="time, narrow", format=".2f", spread=True),
    ),
)
