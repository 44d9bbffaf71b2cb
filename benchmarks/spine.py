"""The figures that the README names: parity with transformers, laws counted, start-up, a pace beside Llama.

    python benchmarks/spine.py [--out results] [--readme README.md]

measures, keeps `OUT/spine.json` and renders `OUT/spine.md` from it; `--readme` also puts the table between the README's
marks. Times are taken side by side in one process, in turns; medians of ratios.
"""

from __future__ import annotations

import argparse
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from parity import every_case
from publish import closing, keep, ratios_in_turns, surroundings
from skipstone import SkipstoneConfig, SkipstoneForCausalLM

ROOT = Path(__file__).resolve().parents[1]
ROUNDS = 9
BEGIN, END = "<!-- figures:begin -->", "<!-- figures:end -->"


def count_laws() -> int:
    """Tests in tests/laws, the slow ones too."""
    command = [sys.executable, "-m", "pytest", "tests/laws", "--collect-only", "-q"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    found = re.search(r"^(\d+)(?:/\d+)? tests? collected", out, re.MULTILINE)
    assert found is not None, out[-500:]
    return int(found.group(1))


def help_seconds() -> float:
    """Median of five starts of `skipstone --help`, whole process."""
    command = [sys.executable, "-m", "skipstone_cli.main", "--help"]
    taken = []
    for _ in range(6):
        start = time.perf_counter()
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken[1:])


def beside_llama(width: int, layers: int, context: int, rows: int) -> dict[str, float]:
    """Our dense decoder's time by that of transformers' Llama of the same sizes; less than 1 is faster."""
    ours = SkipstoneForCausalLM(
        SkipstoneConfig(vocab_size=256, hidden_size=width, num_hidden_layers=layers, num_attention_heads=width // 64)
    )
    size = ours.config
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=width,
            intermediate_size=size.intermediate_size,
            num_hidden_layers=layers,
            num_attention_heads=width // 64,
            bos_token_id=None,
            eos_token_id=None,
        )
    )
    ids = torch.randint(0, 256, (rows, context), generator=torch.Generator().manual_seed(0))
    return {
        "train": _ratio(*(_training_step(model, ids) for model in (ours, llama))),
        "decode, batch 1": _ratio(*(_decode(model, ids[:1, :32]) for model in (ours, llama))),
    }


def _ratio(ours: Callable[[], None], theirs: Callable[[], None]) -> float:
    return statistics.median(ratios_in_turns(ours, theirs, ROUNDS))


def _training_step(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _decode(model: Any, ids: torch.Tensor) -> Callable[[], None]:
    def run() -> None:
        model.eval()
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, pad_token_id=0)

    return run


def measure() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "environment": surroundings(),
        "parity": {name: vars(parity) for name, parity in every_case([])},
        "laws": count_laws(),
        "help_seconds": help_seconds(),
        "beside_llama": {"d 512, 8 layers, context 256, batch 4, fp32": beside_llama(512, 8, 256, 4)},
    }


def render(figures: dict[str, Any]) -> str:
    """Markdown from the record alone."""
    lines = [
        "| logits against transformers', the same weights | max relative error, fp32 | bf16 | greedy text equal |",
        "|---|---|---|---|",
    ]
    for name, parity in figures["parity"].items():
        equal = "yes" if parity["generation"] else "no"
        lines.append(f"| {name} | {parity['fp32']:.1e} | {parity['bf16']:.1e} | {equal} |")
    lines += ["", f"* {figures['laws']} law tests; `skipstone --help` in {figures['help_seconds']:.2f} s."]
    for size, ratios in figures["beside_llama"].items():
        shown = ", ".join(f"{what} {ratio:.2f}" for what, ratio in ratios.items())
        lines.append(f"* Our dense decoder's time by that of transformers' Llama ({size}): {shown}.")
    lines.append("* " + closing("python benchmarks/spine.py --out results --readme README.md", figures["environment"]))
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="keep spine.json and spine.md in this folder")
    parser.add_argument("--readme", type=Path, help="also put the table between the marks of this file")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    figures = measure()
    text = render(figures)
    keep(arguments.out, "spine", "The spine's figures", figures, text)
    if arguments.readme:
        page = arguments.readme.read_text(encoding="utf-8")
        head, tail = page.split(BEGIN)[0], page.split(END)[1]
        arguments.readme.write_text(f"{head}{BEGIN}\n{text}{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
