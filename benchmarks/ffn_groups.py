"""An MLP with neuron groups beside the SwiGLU of the same matrices, and beside a narrower one of equal FLOPs.

    OMP_NUM_THREADS=1 python benchmarks/ffn_groups.py [--widths 256 512] [--shares 0.6 0.4] [--chunks 64 256]

Training: forward and backward of one MLP in fp32, 2,048 tokens in rows of 512; a router as it starts, so that decisions
differ from chunk to chunk. Decoding: one token of one row through a whole model with a cache, 64 steps, with the first
of the chunk sizes. CPU time of this process, which other programs disturb less than wall clock, in turns: medians of
the ratios to SwiGLU. FLOPs are counted while they execute.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from publish import closing, keep, surroundings
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.tokens import Tokens
from skipstone.measure.flops import count_flops
from skipstone.mechanisms.neuron_groups import NeuronGroups
from skipstone.nn.grouped_mlp import GroupedMLP
from skipstone.nn.mlp import FixedActivation, GatedMLP

TOKENS, ROW, SIZE = 2048, 512, 64
BLOCKS, STEPS = 4, 64
Run = Callable[[], Any]


def seconds(run: Run) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def in_turns(runs: dict[str, Run], rounds: int) -> dict[str, float]:
    """CPU time of each by that of the first, medians; a first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name in runs if turn % 2 else reversed(runs):
            taken[name].append(seconds(runs[name]))
    first = next(iter(taken.values()))
    return {
        name: statistics.median(mine / base for mine, base in zip(of[1:], first[1:], strict=True))
        for name, of in taken.items()
    }


def neurons(width: int) -> int:
    """Four times the width: 16 groups at width 256."""
    return 4 * width


def kept(width: int, share: float) -> int:
    return int(neurons(width) / SIZE * share + 1e-9) * SIZE


def step(mlp: GatedMLP, x_BTD: Tensor) -> Run:
    slot = torch.arange(ROW)[None]
    tokens = Tokens(slot_BT=slot, position_BT=slot)

    def run() -> None:
        mlp.zero_grad(set_to_none=True)
        x_BTD.grad = None
        mlp(x_BTD, tokens)[0].square().sum().backward()

    return run


def training(width: int, share: float, chunk: int, rounds: int) -> dict[str, Any]:
    silu, x_BTD = FixedActivation("silu"), torch.randn(TOKENS // ROW, ROW, width, requires_grad=True)
    router = NeuronGroups(width, neurons(width), group_size=SIZE, capacity=share, chunk_size=chunk)
    mlps = {
        "SwiGLU": GatedMLP(width, neurons(width), silu),
        "narrow": GatedMLP(width, kept(width, share), silu),
        "groups": GroupedMLP(width, neurons(width), silu, router),
    }
    runs = {name: step(mlp, x_BTD) for name, mlp in mlps.items()}
    flops = {name: count_flops(run).total for name, run in runs.items()}
    return {
        "width": width,
        "share": share,
        "chunk": chunk,
        "flops": {name: found / flops["SwiGLU"] for name, found in flops.items()},
        "time": in_turns(runs, rounds),
    }


def decode(model: SkipstoneForCausalLM) -> Run:
    token_T = torch.randint(0, 256, (STEPS,), generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def run() -> None:
        cache = DynamicCache(config=model.config)
        for token in token_T:
            model(token.view(1, 1), past_key_values=cache)

    return run


def decoding(width: int, share: float, chunk: int, rounds: int) -> dict[str, Any]:
    def model(size: int, **more: Any) -> SkipstoneForCausalLM:
        values = {"hidden_size": width, "num_hidden_layers": BLOCKS, "num_attention_heads": width // 64}
        return SkipstoneForCausalLM(SkipstoneConfig(**values, intermediate_size=size, **more)).eval()

    groups = {"group_size": SIZE, "capacity": share, "chunk_size": chunk}
    models = {
        "SwiGLU": model(neurons(width)),
        "narrow": model(kept(width, share)),
        "groups": model(neurons(width), neuron_groups=groups),
    }
    times = in_turns({name: decode(found) for name, found in models.items()}, rounds)
    return {"width": width, "share": share, "chunk": chunk, "time": times}


def page(figures: dict[str, Any]) -> str:
    head = "| width | share on | chunk | FLOPs, groups | time, groups | time, narrow |"
    lines = ["Training step of the MLP, by that of SwiGLU:", "", head, "|---|---|---|---:|---:|---:|"]
    for row in figures["training"]:
        cells = (row["flops"]["groups"], row["time"]["groups"], row["time"]["narrow"])
        shown = " | ".join(f"{cell:.2f}" for cell in cells)
        lines.append(f"| {row['width']} | {row['share']:g} | {row['chunk']} | {shown} |")
    lines += ["", "Decoding one row, whole model, by that of SwiGLU:", ""]
    lines += ["| width | share on | chunk | time, groups | time, narrow |", "|---|---|---|---:|---:|"]
    for row in figures["decoding"]:
        shown = " | ".join(f"{row['time'][name]:.2f}" for name in ("groups", "narrow"))
        lines.append(f"| {row['width']} | {row['share']:g} | {row['chunk']} | {shown} |")
    return "\n".join([*lines, "", closing("python benchmarks/ffn_groups.py", figures["environment"]), ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--shares", type=float, nargs="+", default=[0.6, 0.4])
    parser.add_argument("--chunks", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--out", type=Path, help="folder to publish in, such as results")
    given = parser.parse_args()
    torch.manual_seed(0)
    cases = [(width, share) for width in given.widths for share in given.shares]
    figures = {
        "training": [training(*case, chunk, given.rounds) for case in cases for chunk in given.chunks],
        "decoding": [decoding(*case, given.chunks[0], given.rounds) for case in cases],
        "environment": surroundings(),
    }
    keep(given.out, "ffn_groups_cost", "Neuron groups beside SwiGLU: cost", figures, page(figures))


if __name__ == "__main__":
    main()
