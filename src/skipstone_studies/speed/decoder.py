"""A study of the speed of our dense decoder relative to transformers' Llama, and of how fast `skipstone` starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone_studies.speed.interleaved import seconds, time_ratio, timed
from skipstone_studies.study import Column, Figures, RecipeDict, Study

SIZE = {"width": 512, "layers": 8, "context": 256, "rows": 4, "rounds": 9}
STARTS = 5


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: a training step, decoding one row, and starting the command.

    Each is a dict that `measured` takes. scale: not used.
    """
    return {
        "training step": {"task": "train", **SIZE},
        "decoding one row": {"task": "decode", **SIZE},
        "skipstone --help": {"task": "help", "rounds": STARTS},
    }


def measured(recipe: RecipeDict) -> Figures:
    """Time our dense decoder against transformers' Llama, or the start of the command line.

    recipe: an entry of `arms`, whose "task" is "train", "decode" or "help". The result is {"time": seconds of our model
    divided by those of Llama, as {"median", "min", "max"} over rounds}, or {"seconds": the median wall time of the
    process `skipstone --help`}.
    """
    if recipe["task"] == "help":
        command = [sys.executable, "-m", "skipstone_cli.main", "--help"]
        start = timed(lambda: subprocess.run(command, capture_output=True, check=True))
        found = sorted(seconds({"help": start}, recipe["rounds"])["help"])
        return {"seconds": found[len(found) // 2]}
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": recipe["width"], "num_hidden_layers": recipe["layers"]}
    ours = SkipstoneForCausalLM(SkipstoneConfig(**sizes, num_attention_heads=max(1, recipe["width"] // 64)))
    config = {name: getattr(ours.config, name) for name in ("intermediate_size", "num_attention_heads")}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, **config, bos_token_id=None, eos_token_id=None))
    size = (recipe["rows"], recipe["context"])
    ids = torch.randint(0, 256, size, generator=torch.Generator().manual_seed(0))
    task = _training_step if recipe["task"] == "train" else _decode
    return {"time": time_ratio(task(ours, ids), task(llama, ids), recipe["rounds"])}


def _training_step(model: SkipstoneForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _decode(model: SkipstoneForCausalLM, ids: torch.Tensor) -> Callable[[], None]:
    model.eval()
    prompt = ids[:1, :32]

    def run() -> None:
        mask = torch.ones_like(prompt)
        model.generate(prompt, attention_mask=mask, max_new_tokens=32, do_sample=False, pad_token_id=0)

    return run


DECODER = Study(
    name="decoder",
    purpose="Our dense decoder's time relative to transformers' Llama of the same sizes; start-up of the command line",
    about=(
        "**Random weights and tokens.** Width 512, 8 blocks, context 256, batch 4, fp32. Decoding is by `generate`, "
        "32 tokens after a prompt of 32. The models are timed interleaved in one process; the table has medians of "
        "the ratios, and less than 1 is faster."
    ),
    arms=arms,
    seeds={"laptop": (0,)},
    clock=measured,
    columns=(
        Column(key="time", title="time / Llama's", format=".2f", spread=True),
        Column(key="seconds", title="seconds", format=".2f"),
    ),
)
