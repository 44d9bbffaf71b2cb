"""Decoding one row by a part of the neurons, beside the dense model, in turns: rows read in place, and rows copied.

    python benchmarks/neurons_decode.py [--shapes smollm2-135m d2048] [--dtypes float32 bfloat16] [--out results]

Random weights, for the time does not depend on them. Threads: OMP_NUM_THREADS.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from publish import closing, keep, middle, surroundings
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.speed import Lap, Task, decode_task, take_turns
from skipstone.ops import magnitude

SHAPES: dict[str, dict[str, int]] = {  # the second: of a model of 1.2 G parameters, with 4 of its 24 blocks
    "smollm2-135m": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9},
    "d2048": {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 4, "num_attention_heads": 32},
}
KEY_HEADS = {"smollm2-135m": 3, "d2048": 8}
VOCABULARY = {"smollm2-135m": 49152, "d2048": 8192}
PARTS = ((0.82, 0.66), (0.66, 0.5), (0.5, 0.34))  # of up, of down
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
PROMPT, STEPS, TURNS = 32, 32, 7
TITLE = "Decoding by a part of the neurons"
ABOUT = f"""One row, {STEPS} tokens after {PROMPT}, greedy; neurons by magnitude, one by one, the second matrix for the
first share of them and the third for the second. FLOPs and tokens/s by those of the dense model in the same turns: the
median, and the least and greatest of {TURNS}. *In place*: by `ops/magnitude_native.py`, the copy of the third matrix
that the first step makes included; *copied*: without numba."""


def model_of(shape: str, dtype: torch.dtype, part: tuple[float, float] | None) -> SkipstoneForCausalLM:
    torch.manual_seed(0)
    groups = None
    if part is not None:
        groups = {"decision": "magnitude", "group_size": 1, "capacity": part[0], "down_capacity": part[1]}
    sizes = {**SHAPES[shape], "num_key_value_heads": KEY_HEADS[shape], "vocab_size": VOCABULARY[shape]}
    config = SkipstoneConfig(**sizes, tie_word_embeddings=True, neuron_groups=groups)
    return SkipstoneForCausalLM(config).to(dtype).eval()


def copied(task: Task) -> Task:
    """As it is where numba is not at hand."""

    def lap() -> Lap:
        with patch.object(magnitude, "_kernels", lambda: None):
            return task()

    return lap


def measure(shape: str, dtype: torch.dtype) -> list[dict[str, Any]]:
    models = {None: model_of(shape, dtype, None)} | {part: model_of(shape, dtype, part) for part in PARTS}
    prompt = torch.arange(PROMPT)[None] * 37 % VOCABULARY[shape]
    tasks = {(part, "place"): decode_task(model, prompt, STEPS) for part, model in models.items()}
    tasks |= {(part, "copy"): copied(decode_task(models[part], prompt, STEPS)) for part in PARTS}
    rates = take_turns(tasks, TURNS)
    dense, step = rates[None, "place"].each, models[None].cost(tokens=1, past=PROMPT + STEPS // 2).forward.total
    found = []
    for part in PARTS:
        flops = models[part].cost(tokens=1, past=PROMPT + STEPS // 2).forward.total / step
        ratios = {
            way: middle([a / b for a, b in zip(rates[part, way].each, dense, strict=True)]) for way in ("place", "copy")
        }
        found.append({"shape": shape, "dtype": str(dtype)[6:], "part": part, "flops": flops, **ratios})
    found[0]["dense"] = rates[None, "place"].tokens_per_second
    return found


def render(figures: dict[str, Any]) -> str:
    """Markdown from the record alone."""
    lines = [ABOUT, "", "| shape | weights | up, down | FLOPs | in place | copied |", "|---|---|---|---:|---:|---:|"]
    for row in figures["rows"]:
        speeds = ["{median:.2f} ({min:.2f} to {max:.2f})".format(**row[way]) for way in ("place", "copy")]
        up, down = row["part"]
        names = f"{row['shape']} | {row['dtype']} | {up:.2f}, {down:.2f}"
        lines.append(f"| {names} | {row['flops']:.1%} | {' | '.join(speeds)} |")
    return "\n".join([*lines, "", closing(figures["command"], figures["environment"])]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--out", type=Path, help="keep neurons_decode.json and neurons_decode.md in this folder")
    given = parser.parse_args()
    rows = [row for shape in given.shapes for name in given.dtypes for row in measure(shape, DTYPES[name])]
    command = f"python benchmarks/neurons_decode.py --shapes {' '.join(given.shapes)} --dtypes {' '.join(given.dtypes)}"
    figures = {"rows": rows, "command": command, "environment": surroundings()}
    keep(given.out, "neurons_decode", TITLE, figures, render(figures))


if __name__ == "__main__":
    main()
