"""What a small pretrained model loses when it computes less, beside what else the same FLOPs and tokens buy.

    python benchmarks/adapt_stories.py SOURCE [--steps 200] [--seeds 0] [--work FOLDER] [--out results]

SOURCE is stories260K or another dense checkpoint of a folder. It writes stories by itself (temperature 1); every arm is
adapted on the same ones, learning from the text and from the source's distribution. The arms: the source tuned on; a
whole block left out; tokens skipped at random; Mixture-of-Depths; Token-Selective Attention. All that skip execute the
FLOPs of the model without its block. Measured as executed, on stories held out and on text of another kind.
Finished runs in FOLDER are not run again.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from publish import closing, keep, surroundings
from skipstone.adapt.adaptation import adapt
from skipstone.adapt.self_generated import write
from skipstone.evaluate.loaded_run import batches, load_run
from skipstone.measure.flops import flop_check
from skipstone.measure.losses import measure_loss
from skipstone.model.pretrained import convert
from skipstone.runs import Run

CONTEXT, ROWS, STORIES = 256, 128, 600_000
CORPORA = {"stories": None, "wikitext-2": "test"}
ABOUT = """A dense checkpoint that writes stories, adapted for a few hundred steps on stories of its own. Every arm
reads the same rows and learns from text and teacher alike. All that skip execute the FLOPs of the model without one
block. *Nats* and *perplexity* are of the pass that skips, on rows that nobody trained on; wikitext-2 is text of another
kind. FLOPs are counted, one row at a time."""
LEAST = {"score": "block_influence"}


def arms(budget: float, steps: int) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """Name, model, what differs in `adapt`."""
    mixture = {"name": "mixture_of_depths", "layers": {**LEAST, "count": 3}, "capacity_warmup": 0.15}
    best = {**mixture, "kv": "full", "skip": "low_rank", "skip_rank": 16}
    random = {**best, "decision": "random", "weight": "none"}
    gates = {"name": "token_selective", "layers": "1:", "depth_weight": 0.0}
    routed = {"budget": budget, "router_learning_rate": 3e-3, "start": "measured"}
    yield "dense, tuned", {}, {}
    yield "one block dropped", {"drop_layers": {**LEAST, "count": 1}}, {}
    yield "random skipping", {"mechanisms": [random]}, {**routed, "start": "random"}
    yield "mixture of depths", {"mechanisms": [best]}, routed
    yield "same, random start", {"mechanisms": [best]}, {**routed, "start": "random"}
    yield "same, nothing for skipped tokens", {"mechanisms": [{**best, "skip": "identity"}]}, routed
    yield "same, no keys of skipped tokens", {"mechanisms": [{**best, "kv": "kept"}]}, routed
    soft = {"steps": steps * 3 // 5}
    hard = {"steps": steps - soft["steps"], "routing": "causal", "learning_rate": 5e-4}
    closing = {"loss": {**LOSS, "budget": 10.0}, "router_learning_rate": 1e-2, "stages": [soft, hard]}
    yield "token-selective attention", {"mechanisms": [gates]}, {**closing, "budget": budget}


LOSS = {"language_modelling": 0.5, "distillation": 0.5}


def recipe(model: dict[str, Any], options: dict[str, Any], stories: Path, steps: int, seed: int) -> dict[str, Any]:
    train = {"steps": steps, "batch_size": 8, "learning_rate": 1e-3, "warmup_steps": steps // 10, "seed": seed}
    quiet = {"eval_every": 0, "eval_rows": 8, "save_every": 0, "log_every": max(1, steps // 10)}
    data = {"corpus": f"text:{stories}", "context": CONTEXT, "seed": seed}
    return {"model": model, "data": data, "train": {**train, **quiet}, "adapt": {"loss": LOSS, **options}}


def figures(folder: Path, stories: Path, dense: float | None = None) -> dict[str, Any]:
    """Perplexity as executed on the first rows of each corpus, and the share of the dense FLOPs that a row took."""
    found: dict[str, Any] = {}
    for name, split in CORPORA.items():
        corpus = f"text:{stories}" if split is None else name
        loaded = load_run(folder, split or "validation", corpus, CONTEXT)
        assert loaded.data is not None
        rows = batches(loaded.data, 8, loaded.model.device, ROWS)
        found[name] = measure_loss(loaded.model, loaded.primary, rows, activations=False).loss
        if split is None:
            one = flop_check(loaded.model, loaded.primary, batches(loaded.data, 1, loaded.model.device, 16))
            assert one.agree
            found["flops"] = one.counted
    return {**found, "share": 1.0 if dense is None else found["flops"] / dense}


def table(results: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| arm | executed FLOPs | stories, nats | perplexity | wikitext-2, nats |", "|---|---|---|---|---|"]
    for arm, seeds in results.items():
        mean = {key: sum(seed[key] for seed in seeds) / len(seeds) for key in ("share", *CORPORA)}
        spread = max(seed["stories"] for seed in seeds) - min(seed["stories"] for seed in seeds)
        shown = f"{mean['stories']:.4f}" + (f" (range {spread:.4f})" if len(seeds) > 1 else "")
        perplexity = math.exp(mean["stories"])
        lines.append(f"| {arm} | {mean['share']:.1%} | {shown} | {perplexity:.3f} | {mean['wikitext-2']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--work", type=Path, default=Path("runs/adapt_stories"))
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    stories = given.work / "stories"
    if not stories.is_dir():
        write(given.source, stories, tokens=STORIES, length=384, batch=128)
    if not (given.work / "source").is_dir():
        convert(given.source, given.work / "source")
    source = figures(given.work / "source", stories)
    results: dict[str, list[dict[str, Any]]] = {"source": [source]}
    smaller = Run(given.work / "source").load_model()
    whole, block = (smaller.cost(tokens=CONTEXT).forward.total, _block(smaller))
    for seed in given.seeds:
        for arm, model, options in arms(1 - block / whole, given.steps):
            folder = given.work / f"{arm.replace(', ', '-').replace(' ', '-')}-{given.steps}-seed{seed}"
            if not (folder / "result.json").is_file():
                adapt(given.source, recipe(model, options, stories, given.steps, seed), out=folder)
            results.setdefault(arm, []).append(figures(folder, stories, source["flops"]))
            print(table(results))
    environment = surroundings(given.seeds[0])
    record = {"steps": given.steps, "seeds": given.seeds, "arms": results, "environment": environment}
    seeds = " ".join(map(str, given.seeds))
    command = f"python benchmarks/adapt_stories.py SOURCE --steps {given.steps} --seeds {seeds}"
    text = f"{ABOUT}\n\n{table(results)}\n\n{closing(command, environment)}\n"
    keep(given.out, "adapt_stories", "A small pretrained model computes less", record, text)


def _block(model: Any) -> float:
    """Forward FLOPs of one block for a row."""
    cost = model.cost(tokens=CONTEXT).forward
    return (cost.total - cost.head) / model.config.num_hidden_layers


if __name__ == "__main__":
    main()
