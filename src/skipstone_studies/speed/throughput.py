"""A study of the FLOPs per second at which small models train, by width, rows, precision and compilation."""

from __future__ import annotations

import statistics
import time
from functools import partial

import torch

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import PlainDict
from skipstone_studies.speed.interleaved import seconds, spread, timed
from skipstone_studies.study import Column, Figures, RecipeDict, Study

BLOCKS, CONTEXT, VOCABULARY, HEAD = 8, 256, 258, 32
TARGET = 60.0  # GFLOP/s of a core at width 128
ROUNDS = {"laptop": 7, "quick": 1}


def arms(scale: str) -> dict[str, RecipeDict]:
    """Return the settings of every timing by its name: models of several widths, numbers of rows and precisions.

    Each is a dict that `measured` takes. One model is compiled. scale: "laptop", or "quick" with fewer and smaller
    ones.
    """
    usual: PlainDict = {"width": 128, "rows": 8, "precision": "fp32", "compile": False, "rounds": ROUNDS[scale]}
    if scale == "quick":
        usual |= {"width": 32, "rows": 1}
    found: dict[str, PlainDict] = {"fp32": {}, "bf16": {"precision": "bf16"}}
    found = {f"width {usual['width']}, {name}": changes for name, changes in found.items()}
    if scale == "laptop":
        found |= {
            "width 128, bf16, 32 rows": {"precision": "bf16", "rows": 32},
            "width 128, fp32, 32 rows": {"rows": 32},
            "width 128, fp32, compiled": {"compile": True},
            "width 64, fp32": {"width": 64},
            "width 32, fp32": {"width": 32},
            "width 256, fp32": {"width": 256},
        }
    return {name: {**usual, **changes} for name, changes in found.items()}


def measured(recipe: RecipeDict) -> Figures:
    """Measure the FLOPs per second at which a small dense model trains on a CPU.

    recipe: an entry of `arms` with a key "seed". Keys of the result: `seconds`, the median CPU seconds of a training
    step; `gflops`, the step's forward and backward FLOPs by the cost model divided by 1e9 and by its CPU seconds, as
    {"median", "min", "max"} over rounds.
    """
    torch.manual_seed(recipe["seed"])
    config = SkipstoneConfig(
        vocab_size=VOCABULARY,
        hidden_size=recipe["width"],
        num_attention_heads=recipe["width"] // HEAD,
        num_hidden_layers=BLOCKS,
        max_position_embeddings=CONTEXT,
    )
    model = SkipstoneForCausalLM(config).train()
    for block in model.decoder.layers if recipe["compile"] else ():
        block.compile()
    ids = torch.randint(VOCABULARY, (recipe["rows"], CONTEXT))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    run = timed(partial(_step, model, optimizer, ids, recipe["precision"]), time.process_time)
    taken = seconds({"step": run}, recipe["rounds"])["step"]
    flops = model.cost(tokens=CONTEXT, batch=recipe["rows"]).training.total
    return {"seconds": statistics.median(taken), "gflops": spread([flops / 1e9 / each for each in taken])}


def _step(model: SkipstoneForCausalLM, optimizer: torch.optim.Optimizer, ids_BT: torch.Tensor, precision: str) -> None:
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss = model(input_ids=ids_BT, labels=ids_BT).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()


THROUGHPUT = Study(
    name="throughput",
    purpose="FLOPs a second of a core in training, by width, precision and rows",
    about=(
        f"Dense byte models of {BLOCKS} blocks with heads of {HEAD} and a context of {CONTEXT}: forward, backward, "
        "clipping and AdamW. FLOPs are those of the cost model; seconds are CPU seconds of the process, so that other "
        f"processes on the machine disturb them little. The target is {TARGET:.0f} GFLOP/s of one core at width 128; "
        "the grid of [isoflop](isoflop.md), with widths of 16 to 40, reached 3.8."
    ),
    arms=arms,
    seeds={"laptop": (0,), "quick": (0,)},
    columns=(
        Column(key="gflops", title="GFLOP/s a core, median (range)", format=".1f", better="high", spread=True),
        Column(key="seconds", title="seconds a step", format=".3f"),
    ),
    clock=measured,
)
