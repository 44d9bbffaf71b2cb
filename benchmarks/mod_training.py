"""Does a Mixture-of-Depths step take the time that its FLOPs say? Training steps beside the dense model's, in turns.

    python benchmarks/mod_training.py [--sizes small large small-32 large-16] [--out results]

A step is forward, backward and AdamW. The FLOPs are counted while the step runs; the optimizer's,
which multiplies no matrices, are not among them. `bf16` is autocast with fp32 weights, as `Trainer` does it.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import TrainingArguments
from transformers.utils import logging

from publish import closing, keep, middle, ratios_in_turns, surroundings
from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.measure.flops import count_flops, count_host_syncs
from skipstone.train import RoutingTrainer

CAPACITY = 0.125
ABOUT = f"""Seconds of a training step (forward, backward, AdamW) by those of the dense model of the same size, taken in
turns, beside the FLOPs that the step executes by the dense step's. Every other block routed, capacity {CAPACITY}.
*Asked* is how many times the FLOPs the time may be. AdamW and the casts of the weights to bf16 cost the same for
both models whatever is skipped: the fewer tokens a step has, the more of its time they are. `ema_threshold` keeps
another number of tokens every step until its threshold has settled; the FLOPs beside it are those of one step, and are
not to be divided by."""
MOVING = ("ema_threshold",)


@dataclass(frozen=True, kw_only=True)
class Size:
    """A model and its batch. limit: what the time ratio may be, as a multiple of the FLOPs ratio.
    trainer_steps: steps of one run through a trainer."""

    decisions: tuple[str, ...]

    width: int
    blocks: int
    context: int
    rows: int
    limit: float
    rounds: int
    trainer_steps: int

    @property
    def shown(self) -> str:
        return f"d {self.width}, {self.blocks} blocks, context {self.context}, {self.rows} rows"


SIZES = {
    "small": Size(
        decisions=("topk", "predictor", "ema_threshold"),
        width=128,
        blocks=6,
        context=256,
        rows=8,
        limit=1.10,
        rounds=15,
        trainer_steps=16,
    ),
    "large": Size(
        decisions=("topk", "ema_threshold"),
        width=512,
        blocks=12,
        context=1024,
        rows=4,
        limit=1.02,
        rounds=3,
        trainer_steps=2,
    ),
}
SIZES |= {  # what a step does once whatever its tokens, AdamW and casts of weights, is a smaller part of these
    "small-32": replace(SIZES["small"], rows=32, decisions=("topk",), rounds=9),
    "large-16": replace(SIZES["large"], rows=16, decisions=("topk",), rounds=2),
}


def model_of(size: Size, decision: str | None) -> SkipstoneForCausalLM:
    """Random weights; every other block is routed unless `decision` is None."""
    mod = {"name": "mixture_of_depths", "layers": "1::2", "capacity": CAPACITY, "decision": decision}
    torch.manual_seed(0)
    model = SkipstoneForCausalLM(
        SkipstoneConfig(
            vocab_size=256,
            hidden_size=size.width,
            num_hidden_layers=size.blocks,
            num_attention_heads=size.width // 64,
            max_position_embeddings=size.context,
            mechanisms=[mod] if decision else [],
        )
    )
    return model.train()


def ids_of(size: Size) -> torch.Tensor:
    return torch.randint(0, 256, (size.rows, size.context), generator=torch.Generator().manual_seed(0))


def training_step(model: SkipstoneForCausalLM, ids: torch.Tensor, bf16: bool) -> Callable[[], None]:
    """One step of a loop of one's own; thresholds that a trainer moves are moved."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16) if bf16 else nullcontext():
            out = model(ids, labels=ids, use_cache=False, output_records=True)
        out.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        advance(model, out.records)

    return step


def advance(model: SkipstoneForCausalLM, records: Any) -> None:
    for block, record in zip(model.model.layers, records, strict=True):
        for name, mechanism in block.routing_modules().items():
            mechanism.advance(0.5, mechanism.statistics(record[name]))


class Repeated(Dataset[dict[str, torch.Tensor]]):
    """The same rows again and again."""

    def __init__(self, ids: torch.Tensor, times: int) -> None:
        self.ids, self.times = ids, times

    def __len__(self) -> int:
        return len(self.ids) * self.times

    def __getitem__(self, at: int) -> dict[str, torch.Tensor]:
        row = self.ids[at % len(self.ids)]
        return {"input_ids": row, "labels": row}


def trainer_steps(model: SkipstoneForCausalLM, size: Size, folder: str) -> Callable[[], None]:
    """A few steps through `RoutingTrainer`, its set-up included."""
    arguments = TrainingArguments(
        output_dir=folder,
        max_steps=size.trainer_steps,
        per_device_train_batch_size=size.rows,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )

    def steps() -> None:
        RoutingTrainer(model=model, args=arguments, train_dataset=Repeated(ids_of(size), size.trainer_steps)).train()

    return steps


def measure(size: Size) -> dict[str, Any]:
    """Time ratios by decision and way, beside the ratio of the FLOPs that a step executes, and its host syncs."""
    ids = ids_of(size)
    dense_flops = count_flops(training_step(model_of(size, None), ids, bf16=False)).total
    found: dict[str, Any] = {}
    for decision in size.decisions:
        ways = {}
        for way, bf16 in (("fp32", False), ("bf16", True)):
            ours, theirs = (training_step(model_of(size, kind), ids, bf16) for kind in (decision, None))
            ours()  # a first step gives a threshold its value
            flops = count_flops(ours).total / dense_flops
            ways[way] = {"flops": flops, **middle(ratios_in_turns(ours, theirs, size.rounds))}
        with tempfile.TemporaryDirectory() as folder:
            runs = [trainer_steps(model_of(size, kind), size, folder) for kind in (decision, None)]
            ratios = ratios_in_turns(runs[0], runs[1], max(size.rounds // 2, 2))
        ways["RoutingTrainer, fp32"] = {"flops": ways["fp32"]["flops"], **middle(ratios)}
        syncs = count_host_syncs(lambda decision=decision: model_of(size, decision)(ids, labels=ids, use_cache=False))
        found[decision] = {"ways": ways, "host_syncs": syncs.total()}
    return {"shown": size.shown, "limit": size.limit, "decisions": found}


def render(figures: dict[str, Any]) -> str:
    """Markdown from the record alone."""
    lines = [
        ABOUT,
        "",
        "| size | decision | way | FLOPs | time, median (least to greatest) | time / FLOPs | asked | host syncs |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for found in figures["sizes"].values():
        for decision, one in found["decisions"].items():
            for way, times in one["ways"].items():
                over = "–" if decision in MOVING else f"{times['median'] / times['flops']:.2f}"
                lines.append(
                    f"| {found['shown']} | `{decision}` | {way} | {times['flops']:.3f} | {times['median']:.3f} "
                    f"({times['min']:.3f} to {times['max']:.3f}) | {over} | {found['limit']:.2f} "
                    f"| {one['host_syncs']} |"
                )
    return "\n".join(lines) + "\n\n" + closing(figures["command"], figures["environment"]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--out", type=Path, help="keep mod_training.json and mod_training.md in this folder")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    figures = {
        "command": f"python benchmarks/mod_training.py --sizes {' '.join(arguments.sizes)} --out results",
        "environment": surroundings(),
        "sizes": {name: measure(SIZES[name]) for name in arguments.sizes},
    }
    keep(
        arguments.out,
        "mod_training",
        "Mixture-of-Depths: does a step take the time that its FLOPs say?",
        figures,
        render(figures),
    )


if __name__ == "__main__":
    main()
