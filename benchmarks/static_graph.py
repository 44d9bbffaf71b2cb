"""Is the routed graph static? 1,000 inputs: the operations with their shapes, the FLOPs, and compilations.

    python benchmarks/static_graph.py [--inputs 1000] [--out results]

A small decoder, every other block routed at capacity 0.125, takes training passes (forward and backward) over inputs of
one shape, drawn anew each time. Counted are the different lists of (operation, shapes), the different FLOPs, the graphs
that `torch.compile` makes of the whole forward pass, and the passes that it had to compile for.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from publish import closing, keep, surroundings
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.flops import count_flops

STATIC = ("topk", "threshold", "predictor", "random", "positional")
DYNAMIC = ("ema_threshold",)
DYNAMIC_NOTE = """`ema_threshold` decides in training as in generation: how many it keeps depends on the input, so its
shapes do too, and its capacity is met on average (*99 % of rows keep at most* of `skipstone eval`)."""
ROWS, CONTEXT = 2, 128


def model_of(decision: str) -> SkipstoneForCausalLM:
    torch.manual_seed(0)
    mod = {"name": "mixture_of_depths", "layers": "1::2", "decision": decision}
    sizes = {"vocab_size": 64, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2}
    return SkipstoneForCausalLM(SkipstoneConfig(**sizes, mechanisms=[mod])).train()


def inputs(count: int) -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (ROWS, CONTEXT), generator=draw) for _ in range(count)]


class Signature(TorchDispatchMode):
    """A digest of every operation that runs and the shapes that it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.digest = hashlib.sha256()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        shapes = [tuple(x.shape) for x in torch.utils._pytree.tree_leaves(args) if isinstance(x, torch.Tensor)]
        self.digest.update(f"{func} {shapes}".encode())
        return func(*args, **(kwargs or {}))


def passed(model: SkipstoneForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=False)

    return run


def signature(run: Callable[[], None]) -> str:
    with Signature() as seen:
        run()
    return seen.digest.hexdigest()


def measure(decision: str, count: int) -> dict[str, int]:
    model, batches = model_of(decision), inputs(count)
    passed(model, batches[0])()  # gradients exist from here on
    signatures = {signature(passed(model, ids)) for ids in batches}
    flops = {count_flops(passed(model, ids)).total for ids in batches[: max(count // 10, 1)]}
    return {"lists": len(signatures), "flops": len(flops), **compiled(model, batches, decision in STATIC)}


def compiled(model: SkipstoneForCausalLM, batches: list[torch.Tensor], whole: bool) -> dict[str, int]:
    torch._dynamo.reset()
    counters.clear()
    forward = torch.compile(model, backend="aot_eager", fullgraph=whole)
    late, before = 0, 0
    for i, ids in enumerate(batches):
        forward(ids, labels=ids, use_cache=False).loss.backward()
        now = counters["stats"]["unique_graphs"]
        late += i > 0 and now > before
        before = now
    return {"graphs": before, "recompilations": late, "breaks": sum(counters["graph_break"].values())}


def render(figures: dict[str, Any]) -> str:
    """Markdown from the record alone."""
    lines = [
        f"{figures['inputs']:,} training passes, over different inputs of {ROWS} rows of {CONTEXT} tokens.",
        "FLOPs are counted over a tenth of them.",
        "",
        "| decision | lists of operations, shapes | different FLOPs | graphs | recompilations after the first |",
        "|---|---:|---:|---:|---:|",
    ]
    for decision, found in figures["decisions"].items():
        lines.append(
            f"| `{decision}` | {found['lists']} | {found['flops']} | {found['graphs']} | {found['recompilations']} |"
        )
    lines += ["", DYNAMIC_NOTE]
    return "\n".join(lines) + "\n\n" + closing(figures["command"], figures["environment"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--out", type=Path, help="keep static_graph.json and static_graph.md in this folder")
    arguments = parser.parse_args()
    logging.getLogger("torch._dynamo").setLevel(logging.ERROR)  # a graph break is what is counted here
    figures = {
        "command": "python benchmarks/static_graph.py --out results",
        "environment": surroundings(),
        "inputs": arguments.inputs,
        "decisions": {decision: measure(decision, arguments.inputs) for decision in (*STATIC, *DYNAMIC)},
    }
    keep(arguments.out, "static_graph", "Is the routed graph static?", figures, render(figures))


if __name__ == "__main__":
    main()
