"""A training step of a mixture of experts beside the dense MLP that costs a token the same FLOPs.

    OMP_NUM_THREADS=1 python benchmarks/experts.py [--widths 256 512] [--tokens 4096] [--experts 8] [--top-k 2]

fp32, forward and backward of the MLP alone, balancing loss included. `mixtral` is transformers' own block, with its
loop over experts and by its grouped products; it computes no loss. No-ops: half as many as experts, chosen as often as
others. Medians of turns taken by all cases in one process: wall clock, and CPU time, which other programs disturb less.
"""

from __future__ import annotations

import argparse
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

TURNS, WARM = 15, 3
Step = Callable[[Tensor], Tensor]


def cases(width: int, tokens: int, experts: int, top_k: int) -> dict[str, tuple[nn.Module, Step]]:
    neurons = -(-8 * width // (3 * 8 * top_k)) * 8 * top_k
    slot = torch.arange(tokens)[None]
    given, silu = Tokens(slot_BT=slot, position_BT=slot), FixedActivation("silu")
    built: dict[str, tuple[nn.Module, Step]] = {}

    def ours(name: str, mlp: nn.Module) -> None:
        def step(x: Tensor) -> Tensor:
            y, records = mlp(x, given)
            losses = [record.loss_BT.sum() for record in records.values()]
            return y.square().sum() + sum(losses)

        built[name] = (mlp, step)

    def theirs(kind: str) -> None:
        config = MixtralConfig(
            hidden_size=width,
            intermediate_size=neurons // top_k,
            num_local_experts=experts,
            num_experts_per_tok=top_k,
        )
        config._experts_implementation = kind
        block = MixtralSparseMoeBlock(config)
        for parameter in block.parameters():
            nn.init.normal_(parameter, 0.0, 0.02)
        built[f"mixtral, {kind}"] = (block, lambda x: block(x).square().sum())

    ours("dense", GatedMLP(width, neurons, silu))
    ours("experts", ExpertsMLP(width, neurons, silu, count=experts, top_k=top_k))
    ours("experts and no-ops", ExpertsMLP(width, neurons, silu, count=experts, top_k=top_k, no_op=experts // 2))
    theirs("eager")
    theirs("grouped_mm")
    return built


def turn(module: nn.Module, step: Step, x: Tensor) -> tuple[float, float]:
    """Wall-clock and CPU seconds of one step."""
    module.zero_grad(set_to_none=True)
    x.grad = None
    wall, cpu = time.perf_counter(), time.process_time()
    step(x).backward()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2)
    size = parser.parse_args()
    torch.manual_seed(0)
    for width in size.widths:
        built = cases(width, size.tokens, size.experts, size.top_k)
        x = torch.randn(1, size.tokens, width, requires_grad=True)
        taken: dict[str, list[tuple[float, float]]] = {name: [] for name in built}
        for _ in range(TURNS + WARM):
            for name, (module, step) in built.items():
                taken[name].append(turn(module, step, x))
        middle = {n: [statistics.median(kind) for kind in zip(*t[WARM:], strict=True)] for n, t in taken.items()}
        print(
            f"\n| d {width}, {size.tokens} tokens | ms a step | x dense | CPU ms | x dense |\n|---|---:|---:|---:|---:|"
        )
        for name, (wall, cpu) in middle.items():
            shares = (wall / middle["dense"][0], cpu / middle["dense"][1])
            print(f"| {name} | {1e3 * wall:.0f} | {shares[0]:.2f} | {1e3 * cpu:.0f} | {shares[1]:.2f} |")


if __name__ == "__main__":
    main()
