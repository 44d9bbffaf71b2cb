"""Training steps of the whole 597,153,888-parameter model, for real: memory, seconds, FLOPs.

    OMP_NUM_THREADS=1 python benchmarks/full_size.py [--tokens 128] [--steps 2] [--device cpu] [--out results]

The model, the optimizer and its groups, the clipping, the autocast and the loss in chunks are those of
recipes/polychromatic-0.6b.yaml, at the rate of the end of its warm-up; the row is short, two documents of random
tokens, and repeats, so that its loss must fall. A first step allocates what later ones have: times are those of the
last. On a CPU memory is the most that the process ever held (VmHWM, Linux); on a GPU the most that was allocated.
Weights, gradients and both moments are fp32. Speeds are by CPU time on a CPU, by the clock on a GPU.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from publish import closing, keep, surroundings
from skipstone.train import setup
from skipstone.train.decay import decaying
from skipstone.train.recipe import Recipe, read_recipe

TITLE = "Training steps of the whole 597M-parameter PolyGLU model"
RECIPE = Path(__file__).parents[1] / "recipes" / "polychromatic-0.6b.yaml"


def row(tokens: int, vocabulary: int, device: str) -> dict[str, Tensor]:
    """One packed row of two documents, the first as long as a third."""
    slot = torch.arange(tokens)
    document = (slot >= tokens // 3).long()
    ids = torch.randint(vocabulary, (1, tokens), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill((slot == 0) | (slot == tokens // 3), -100)
    given = {"input_ids": ids, "labels": labels, "document_ids": document[None]}
    given["position_ids"] = (slot - document * (tokens // 3))[None]
    return {name: tensor.to(device) for name, tensor in given.items()}


def optimizer_of(model: Any, recipe: Recipe) -> torch.optim.Optimizer:
    train, named = recipe.train, dict(model.named_parameters())
    decays = set(decaying(model, named, train.no_decay))
    groups = [
        {"params": [p for n, p in named.items() if n in decays], "weight_decay": train.weight_decay},
        {"params": [p for n, p in named.items() if n not in decays], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=train.learning_rate, betas=(train.beta1, train.beta2))


def seconds(device: str) -> tuple[float, float]:
    """Wall clock, and CPU time, which other programs disturb less."""
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


def step(model: Any, optimizer: torch.optim.Optimizer, given: dict[str, Tensor], recipe: Recipe, device: str) -> Any:
    """(loss, norm of the gradient, wall-clock and CPU seconds of each part)."""
    at = [seconds(device)]
    with torch.autocast(device, torch.bfloat16):
        loss = model(**given, use_cache=False, loss_chunk=recipe.train.loss_chunk or 0).loss
    at.append(seconds(device))
    loss.backward()
    at.append(seconds(device))
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.train.max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    at.append(seconds(device))
    parts = zip(("forward", "backward", "optimizer"), at, at[1:], strict=False)
    return loss.item(), norm.item(), {name: (b[0] - a[0], b[1] - a[1]) for name, a, b in parts}


def peak(device: str) -> float:
    """GB."""
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 1e9
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    recipe = read_recipe(yaml.safe_load(RECIPE.read_text(encoding="utf-8")))
    config = setup.model_config(recipe.model, recipe.data.context, {})
    began = time.perf_counter()
    with torch.device(asked.device):
        model = setup.build_model(config, recipe.train).train()
    found: dict[str, Any] = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "routing": sum(p.numel() for m in model.routing_modules() for p in m.parameters()),
        "tokens": asked.tokens,
        "threads": torch.get_num_threads(),
        "build_seconds": time.perf_counter() - began,
        "uniform_loss": math.log(config.vocab_size),
    }
    given = row(asked.tokens, config.vocab_size, asked.device)
    optimizer, steps = optimizer_of(model, recipe), []
    for _ in range(asked.steps):
        steps.append(step(model, optimizer, given, recipe, asked.device))
        print(f"loss {steps[-1][0]:.4f}  gradient {steps[-1][1]:.3f}  seconds {steps[-1][2]}", flush=True)
    kind = 1 if asked.device == "cpu" else 0  # a GPU's time is not the process's
    taken = {name: pair[kind] for name, pair in steps[-1][2].items()}
    flops = model.cost(tokens=asked.tokens, routing="oracle").training.total
    found |= {"losses": [s[0] for s in steps], "gradient_norms": [s[1] for s in steps]}
    found |= {"seconds": {name: {"wall": wall, "cpu": cpu} for name, (wall, cpu) in steps[-1][2].items()}}
    found |= {"peak_gb": peak(asked.device), "flops": flops}
    found["flops_per_second"] = flops / (taken["forward"] + taken["backward"])
    found["tokens_per_second"] = asked.tokens / sum(taken.values())
    environment = surroundings()
    command = f"python benchmarks/full_size.py --tokens {asked.tokens} --steps {asked.steps} --device {asked.device}"
    text = f"{page(found)}\n\n{closing(command, environment)}\n"
    keep(asked.out, "full_size", TITLE, {**found, "environment": environment}, text)


def page(found: dict[str, Any]) -> str:
    """A table of what was measured."""
    losses = ", ".join(f"{loss:.3f}" for loss in found["losses"])
    parts = ", ".join(f"{name} {taken['cpu']:.1f}" for name, taken in found["seconds"].items())
    rows = [
        ("parameters, of them for routing", f"{found['parameters']:,}, {found['routing']:,}"),
        ("tokens a step", f"{found['tokens']:,}"),
        (f"loss, step by step (uniform: {found['uniform_loss']:.3f})", losses),
        ("norm of the gradient", ", ".join(f"{norm:.2f}" for norm in found["gradient_norms"])),
        ("CPU seconds of the last step", parts),
        ("most memory, GB", f"{found['peak_gb']:.1f}"),
        ("training FLOPs a step, by the cost model", f"{found['flops']:.3g}"),
        ("FLOPs a second, forward and backward", f"{found['flops_per_second']:.3g}"),
        ("tokens a second, optimizer included", f"{found['tokens_per_second']:.1f}"),
    ]
    return "\n".join(["| | |", "|---|---:|", *(f"| {name} | {value} |" for name, value in rows)])


if __name__ == "__main__":
    main()
