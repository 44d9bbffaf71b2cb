"""PolyGLU adapted from a SwiGLU checkpoint, beside PolyGLU trained from scratch for the same FLOPs.

    python benchmarks/adapt_polyglu.py [--steps 400] [--more 200] [--seeds 0 1 2] [--work FOLDER] [--out results]

A small SwiGLU model is trained for `steps` steps; what follows costs the FLOPs of `more` steps of PolyGLU: the
checkpoint trained on as it is, or adapted to PolyGLU. Beside it, from scratch: PolyGLU and SwiGLU for the FLOPs of both
parts together, and PolyGLU for those of the second part alone, when the checkpoint was there anyway. Finished runs in
FOLDER are not run again.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from publish import closing, keep, surroundings
from skipstone.adapt.adaptation import adapt
from skipstone.data.config import DataConfig
from skipstone.data.prepare import prepare
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.measure.losses import measure_loss
from skipstone.mechanisms.mix_figures import MixFigures
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.train.training import train

CONTEXT, BATCH, TINY = 128, 16, {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
DATA: dict[str, Any] = {"corpus": "tiny-shakespeare", "context": CONTEXT}
RATE, LATER = 3e-3, 1e-3  # of a training from scratch, and of what goes on with a checkpoint
FEWEST = {"noise": False, "tau_end": 1.0}  # what a neutral start needs
SOURCE, ADAPTED, TUNED = "SwiGLU, the checkpoint", "checkpoint, adapted to PolyGLU", "checkpoint, trained on"
BOTH = ("PolyGLU from scratch", "SwiGLU from scratch")
LEAST = "PolyGLU from scratch, FLOPs of adapting alone"
TITLE = "PolyGLU adapted from a SwiGLU checkpoint, and from scratch"
ABOUT = f"""Tiny-Shakespeare, {TINY["num_hidden_layers"]} blocks of width {TINY["hidden_size"]}, rows of {CONTEXT}
characters; *FLOPs* are those of the training, forward and backward, by the SwiGLU checkpoint's. *Nats* are of the whole
validation split. *Apart*: neurons whose strongest function is another one than that of most in their layer, mean over
layers and tokens."""


def forward_flops(activation: Any) -> float:
    """Of a row, dense or with PolyGLU."""
    size = prepare(DataConfig(**DATA)).vocab_size
    model = SkipstoneForCausalLM(SkipstoneConfig.from_plain({**TINY, "activation": activation, "vocab_size": size}))
    return float(model.cost(tokens=CONTEXT).forward.total)


def scratch(activation: Any, steps: int, seed: int) -> dict[str, Any]:
    return {"model": {**TINY, "activation": activation}, "data": DATA, "train": training(steps, RATE, seed)}


def training(steps: int, rate: float, seed: int) -> dict[str, Any]:
    quiet = {"eval_every": 0, "eval_rows": 8, "save_every": 0, "log_every": max(1, steps // 10)}
    return {
        "steps": steps,
        "batch_size": BATCH,
        "learning_rate": rate,
        "warmup_steps": steps // 10,
        "seed": seed,
        **quiet,
    }


def runs(given: argparse.Namespace, seed: int) -> Iterator[tuple[str, Path, float]]:
    """Name, run folder and FLOPs of the training by the checkpoint's; trains what is not there."""
    swiglu, polyglu = forward_flops("silu"), forward_flops("polyglu")
    whole = swiglu * given.steps
    more = polyglu * given.more

    def folder(name: str) -> Path:
        return given.work / f"{name.replace(',', '').replace(' ', '-')}-{given.steps}-{given.more}-seed{seed}"

    def trained(name: str, recipe: dict[str, Any], source: Path | None = None) -> Path:
        path = folder(name)
        if not (path / "result.json").is_file():
            _ = train(recipe, out=path) if source is None else adapt(str(source), recipe, out=path)
        return path

    source = trained(SOURCE, scratch("silu", given.steps, seed))
    yield SOURCE, source, 1.0
    later = {"data": DATA, "adapt": {"router_learning_rate": 1e-2}}
    model = {"activation": {"name": "polyglu", **FEWEST}}
    on = {"model": model, "train": training(given.more, LATER, seed), **later}
    yield ADAPTED, trained(ADAPTED, on, source / "model"), 1 + more / whole
    same = {"model": {}, "train": training(round(more / swiglu), LATER, seed), **later}
    yield TUNED, trained(TUNED, same, source / "model"), 1 + more / whole
    for name, activation, each in zip(BOTH, ("polyglu", "silu"), (polyglu, swiglu), strict=True):
        steps = round((whole + more) / each)
        yield name, trained(name, scratch(activation, steps, seed)), each * steps / whole
    yield LEAST, trained(LEAST, scratch("polyglu", given.more, seed)), more / whole


def figures(folder: Path) -> dict[str, float]:
    """Nats a character; where neurons choose, the share that chooses another function than most of its layer, on some
    rows."""
    loaded = load_run(folder, "validation")
    assert loaded.data is not None
    rows = list(batches(loaded.data, 32, loaded.model.device))
    found = {"nats": measure_loss(loaded.model, loaded.primary, rows, activations=False).loss}
    records = loaded.model(**rows[0], routing="causal", output_records=True).records
    mixes: list[Any] = [module for module in loaded.model.routing_modules() if isinstance(module, MixFigures)]
    if mixes:
        each = [mix.diversity(records[mix.placement.layer][mix.placement.name]).nanmean() for mix in mixes]
        found["apart"] = float(torch.stack(each).mean())
    return found


def table(results: dict[str, list[dict[str, float]]]) -> str:
    lines = ["| arm | training FLOPs | nats | by the checkpoint trained on | apart |", "|---|---:|---:|---:|---:|"]
    base = [seed["nats"] for seed in results[TUNED]]
    for arm, seeds in results.items():
        each = [seed["nats"] for seed in seeds]
        over = [a - b for a, b in zip(each, base, strict=True)]
        many = len(seeds) > 1
        nats = f"{statistics.fmean(each):.4f}" + (f" ± {statistics.stdev(each):.4f}" if many else "")
        far = f"{statistics.fmean(over):+.4f}" + (f" ({min(over):+.4f} to {max(over):+.4f})" if many else "")
        gone = f"{statistics.fmean(seed['apart'] for seed in seeds):.1%}" if "apart" in seeds[0] else "–"
        lines.append(f"| {arm} | {seeds[0]['flops']:.2f} | {nats} | {far} | {gone} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--more", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--work", type=Path, default=Path("runs/adapt_polyglu"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    results: dict[str, list[dict[str, float]]] = {}
    for seed in given.seeds:
        for arm, folder, flops in runs(given, seed):
            results.setdefault(arm, []).append({**figures(folder), "flops": flops})
    environment = surroundings(given.seeds[0])
    record = {"steps": given.steps, "more": given.more, "seeds": given.seeds, "arms": results}
    seeds = " ".join(map(str, given.seeds))
    command = f"python benchmarks/adapt_polyglu.py --steps {given.steps} --more {given.more} --seeds {seeds}"
    text = f"{ABOUT}\n\n{table(results)}\n\n{closing(command, environment)}\n"
    keep(given.out, "adapt_polyglu", TITLE, {**record, "environment": environment}, text)


if __name__ == "__main__":
    main()
