"""What is lost when weights are quantised, tokens skip, or both at once.

    python benchmarks/quantised.py DENSE_RUN OTHER_RUN... [--rows 128] [--group 0] [--name quantised] [--out results]
    python benchmarks/quantised.py SAVED_MODEL OTHER_RUN... --corpus wikitext-2 --split test --context 256

Run folders of the same data, the first of a dense model, as `adapt_stories.py` and the experiment `ffn_groups` leave
them; or run folders and saved models, and the text to measure them on. A model with neuron groups is measured once more
with the groups cut out that training rows do not use. Each model is measured with its own weights, and with linear
layers in int8 and int4 by torchao (weights only, one scale a row, or for int4 one for every --group weights of it),
after it was saved and loaded again. Routers, gates, norms and embeddings keep full precision: none of them is an
nn.Linear.
"""

from __future__ import annotations

import argparse
import math
import shlex
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup
from transformers import TorchAoConfig

from publish import closing, keep, surroundings
from skipstone import SkipstoneForCausalLM
from skipstone.adapt.prune import export_pruned
from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.evaluate.metrics import sample_ids
from skipstone.measure.losses import measure_loss
from skipstone.measure.speed import Rate, decode_task, take_turns

WEIGHTS = ("as trained", "int8", "int4")
PROMPT, NEW, ROUNDS = 64, 32, 5
ABOUT = """Weights of linear layers are quantised by torchao, weights only, one scale for {scale}; routers, gates,
norms and embeddings keep full precision. Every model was saved and loaded again before it was measured. *Nats* are of
the pass that skips. *Interaction*: what skipping and quantising lose together, minus the sum of what each loses alone.
*MB*: the weights' file; int4 values lie in bytes of their own here, packed they would take half. *Tokens/s*: decoding
one row. *Pruned*: without the groups of neurons that 64 training rows do not use."""


def models(loaded: LoadedRun, folder: Path) -> Iterator[tuple[str, Path]]:
    """The run's name and its model's folder; the same of its pruned one."""
    name = loaded.run.name
    yield name, loaded.run.model_folder()
    groups = loaded.model.config.neuron_groups
    if groups is not None and groups.get("decision", "learned") == "learned":
        pruned = folder / f"{name}-pruned"
        export_pruned(loaded.run.folder, pruned)
        yield f"{name}, pruned", pruned


def quantised(name: str, group: int) -> dict[str, Any]:
    """What `from_pretrained` is told to load weights as `name` says."""
    if name == "as trained":
        return {}
    spread = PerGroup(group) if group else PerAxis(0)
    config = Int8WeightOnlyConfig() if name == "int8" else IntxWeightOnlyConfig(torch.int4, spread)
    return {"quantization_config": TorchAoConfig(config)}


def variants(loaded: LoadedRun, source: Path, folder: Path, group: int) -> Iterator[tuple[str, LoadedRun, int]]:
    """Name of the weights, the run with them, bytes of their file."""
    for name in WEIGHTS:
        options = quantised(name, group)
        made = SkipstoneForCausalLM.from_pretrained(source, **options).eval()
        saved = folder / f"{source.name}-{loaded.run.name}-{name}"
        made.save_pretrained(saved)
        loaded = SkipstoneForCausalLM.from_pretrained(saved).eval()
        ids_BT = sample_ids(loaded, 2, PROMPT)
        with torch.no_grad():
            assert torch.equal(loaded(ids_BT).logits, made(ids_BT).logits), f"{saved} is not what was saved"
        assert all(p.dtype.is_floating_point for n, p in loaded.named_parameters() if "router" in n)
        yield name, replace(loaded, model=loaded), (saved / "model.safetensors").stat().st_size


def figures(given: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """By "run, weights": nats, bytes and tokens/s."""
    found: dict[str, dict[str, Any]] = {}
    tasks = {}
    with tempfile.TemporaryDirectory() as folder:
        opened_runs = [load_run(run, given.split, given.corpus, given.context) for run in given.runs]
        listed = [(whole, *model) for whole in opened_runs for model in models(whole, Path(folder))]
        for whole, model_name, source in listed:
            for weights, loaded, size in variants(whole, source, Path(folder), given.group):
                name = f"{model_name}, {weights}"
                assert loaded.data is not None
                nats = measure_loss(
                    loaded.model,
                    loaded.primary,
                    batches(loaded.data, 8, loaded.model.device, given.rows),
                    activations=False,
                ).loss
                found[name] = {"run": model_name, "weights": weights, "nats": nats, "bytes": size}
                tasks[name] = decode_task(loaded.model, sample_ids(loaded, 1, PROMPT), NEW)
        rates: dict[str, Rate] = take_turns(tasks, ROUNDS)
    for name, rate in rates.items():
        found[name] |= {"tokens_per_second": rate.tokens_per_second, "spread": rate.spread}
    return found


def add_interactions(found: dict[str, dict[str, Any]]) -> None:
    """Beside everything that is neither the first run nor as trained."""
    nats = {(f["run"], f["weights"]): f["nats"] for f in found.values()}
    first, plain = next(iter(nats))
    for f in found.values():
        if f["run"] != first and f["weights"] != plain:
            alone = nats[f["run"], plain] + nats[first, f["weights"]] - nats[first, plain]
            f["interaction"] = f["nats"] - alone


def table(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| run | weights | MB | nats | perplexity | interaction, nats | tokens/s |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for f in found.values():
        interaction = f"{f['interaction']:+.4f}" if "interaction" in f else "–"
        speed = f"{f['tokens_per_second']:.0f} ± {f['spread']:.0%}"
        cells = [f["run"], f["weights"], f"{f['bytes'] / 1e6:.2f}", f"{f['nats']:.4f}", f"{math.exp(f['nats']):.3f}"]
        lines.append("| " + " | ".join([*cells, interaction, speed]) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--group", type=int, default=0, help="weights of a row that share an int4 scale; 0: all")
    parser.add_argument("--corpus", help="text to measure on; the runs' own if absent")
    parser.add_argument("--split", default="validation", help="of that text")
    parser.add_argument("--context", type=int, help="tokens of its rows; the runs' own if absent")
    parser.add_argument("--name", default="quantised", help="of the page")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    found = figures(given)
    add_interactions(found)
    environment = surroundings()
    command = f"python benchmarks/quantised.py {shlex.join(run.name for run in given.runs)} --rows {given.rows}"
    for option in ("group", "corpus", "split", "context", "name"):
        if (value := getattr(given, option)) != parser.get_default(option):
            command += f" --{option} {value}"
    about = ABOUT.format(scale="a row" if not given.group else f"a row, or in int4 for {given.group} weights of it")
    text = f"{about}\n\n{table(found)}\n\n{closing(command, environment)}\n"
    keep(given.out, given.name, "Skipping and quantised weights", {"figures": found, "environment": environment}, text)


if __name__ == "__main__":
    main()
