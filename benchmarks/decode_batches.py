"""Decoding steps of a Mixture-of-Depths model beside the dense model's, by number of rows, in turns.

    python benchmarks/decode_batches.py [--size small | large] [--rows 1 2 4 8 16 32 64] [--out results]

Every other block keeps 12.5 % of the tokens: random weights, and thresholds set where the scores of random text after
these prompts say so. Both models continue the same prompts with the same tokens, one a row and step. `--out` keeps
decode.json and decode.md; a size that was measured before stays in them. Threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

from decoding import Decoding, Size, model_of, text
from publish import closing, keep, middle, surroundings
from skipstone.measure.speed import Task, take_turns

CAPACITY, ROWS = 0.125, (1, 2, 4, 8, 16, 32, 64)
ROUTED = {"name": "mixture_of_depths", "layers": "1::2", "capacity": CAPACITY, "decision": "ema_threshold"}
ABOUT = f"""One token a row and step, fp32, greedy decisions of a causal threshold that keeps {CAPACITY:.1%} in every
other block. *Speed* is the dense model's seconds by the routed model's in the same turn, so tokens per second by the
dense model's: above 1 is faster. *Rows computed* is the mean over routed blocks and steps."""

SIZES = {
    "small": Size(width=256, blocks=6, vocabulary=256),
    "large": Size(width=1024, blocks=10, vocabulary=1024, prompt=48, steps=24, turns=7),
}


@torch.inference_mode()
def memory(decoding: Decoding) -> dict[str, int]:
    """Entries and bytes, slots included, that a prompt and a turn's tokens leave in a new cache."""
    model, size = decoding.model, decoding.size
    cache = DynamicCache(config=model.config)
    model(decoding.prompts, past_key_values=cache)
    for token in text(size, decoding.rows, size.steps, seed=101).split(1, dim=1):
        model(token, past_key_values=cache)
    stores = [layer.kv for layer in cache.layers]  # type: ignore[attr-defined]
    return {
        "entries": sum(store.stored() for store in stores),
        "bytes": sum(store.bytes() for store in stores),
        "allocated": sum(store.bytes(allocated=True) for store in stores),
    }


def measure(size: Size, rows: Sequence[int]) -> dict[str, Any]:
    models = {"dense": model_of(size, []), "routed": model_of(size, [ROUTED])}
    parameters = models["routed"].cost(1).parameters
    found = {}
    for count in rows:
        decodings = {name: Decoding(model, size, count) for name, model in models.items()}
        tasks: dict[str, Task] = {name: decoding.lap for name, decoding in decodings.items()}
        rates = take_turns(tasks, size.turns)
        seconds = {name: [lap.seconds / size.steps for lap in rate.laps] for name, rate in rates.items()}
        found[str(count)] = {
            "seconds": {name: statistics.median(each) for name, each in seconds.items()},
            "speed": middle([a / b for a, b in zip(seconds["dense"], seconds["routed"], strict=True)]),
            "computed": decodings["routed"].computed(),
            "memory": {name: memory(decoding) for name, decoding in decodings.items()},
        }
        print(f"{count} rows: {found[str(count)]['speed']}", flush=True)
    head = models["routed"].lm_head.weight.numel() + parameters.embedding
    return {**vars(size), "parameters": parameters.total, "embedding_and_head": head / parameters.total, "rows": found}


def render(figures: dict[str, Any]) -> str:
    """Markdown from the record alone."""
    lines = [ABOUT]
    for name, found in figures["sizes"].items():
        share = f"{found['embedding_and_head']:.1%} are embedding and head"
        lines += [
            "",
            f"## {name}: d {found['width']}, {found['blocks']} blocks, {found['parameters'] / 1e6:.1f} M parameters",
            "",
            f"Of the parameters {share}. Prompts of {found['prompt']} tokens, {found['steps']} steps a turn.",
            "",
            "| rows | dense, ms a step | routed, ms a step | speed (least to greatest) | rows computed | share |",
            "|---:|---:|---:|---:|---:|---:|",
        ]
        for rows, one in found["rows"].items():
            dense, routed = (1e3 * one["seconds"][kind] for kind in ("dense", "routed"))
            speed = "{median:.2f} ({min:.2f} to {max:.2f})".format(**one["speed"])
            kept = one["computed"] / int(rows)
            lines.append(f"| {rows} | {dense:.2f} | {routed:.2f} | {speed} | {one['computed']:.2f} | {kept:.1%} |")
        lines += ["", *_memory(found["rows"]), "", closing(found["command"], found["environment"])]
    return "\n".join(lines) + "\n"


def _memory(rows: dict[str, Any]) -> list[str]:
    lines = ["| rows | KV entries, share of dense | KV bytes with slots | allocated | allocated but unused |"]
    lines.append("|---:|---:|---:|---:|---:|")
    for count, one in rows.items():
        ours, dense = one["memory"]["routed"], one["memory"]["dense"]
        shares = " | ".join(f"{ours[what] / dense[what]:.1%}" for what in ("entries", "bytes", "allocated"))
        lines.append(f"| {count} | {shares} | {1 - ours['bytes'] / ours['allocated']:.1%} of it |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--out", type=Path, help="keep decode.json and decode.md in this folder")
    arguments = parser.parse_args()
    measured = measure(SIZES[arguments.size], arguments.rows)
    rows = "" if arguments.rows == list(ROWS) else f" --rows {' '.join(map(str, arguments.rows))}"
    command = f"python benchmarks/decode_batches.py --size {arguments.size}{rows} --out results"
    kept = arguments.out / "decode.json" if arguments.out else None
    figures = json.loads(kept.read_text(encoding="utf-8")) if kept and kept.is_file() else {"sizes": {}}
    figures["sizes"][arguments.size] = {**measured, "command": command, "environment": surroundings()}
    keep(arguments.out, "decode", "Decoding, by number of rows", figures, render(figures))


if __name__ == "__main__":
    main()
