"""Part of the GPU study: training steps of the PolyGLU model with 597 million parameters, in tokens per second."""

from __future__ import annotations

import statistics

from skipstone.core.strict import PlainDict
from skipstone.train import setup
from skipstone.train.recipe import read_recipe
from skipstone_studies.speed.full_size import optimizer_of, row, step
from skipstone_studies.speed.gpu.bench import WARM_UP, Bench
from skipstone_studies.speed.gpu.training import compile_blocks, share_of_peak


def measure(bench: Bench) -> None:
    """Time training steps for several numbers of rows, the largest also with compiled blocks.

    bench: gives the device and the sizes, and stores the figures of `steps_of` for each number of rows (milliseconds,
    tokens and FLOPs per second and others).
    """
    for rows in bench.sizes["of_rows"]:
        bench.measure(f"{rows} x {bench.sizes['tokens']} tokens, eager", steps_of, rows, False)
    most = max(bench.sizes["of_rows"])
    bench.measure(f"{most} x {bench.sizes['tokens']} tokens, compiled", steps_of, most, True)


def steps_of(bench: Bench, rows: int, compiled: bool) -> PlainDict:
    """Time training steps (forward, backward, clipping, AdamW), and return figures of the median one.

    bench: gives the device and the sizes. rows: number of rows of a step. compiled: whether to compile the blocks. Keys
    of the result: `parameters` (their number), `ms`, `tokens_per_second`, `tflops_per_second` (FLOPs by the cost
    model), `mfu` (these FLOPs divided by the GPU's peak, absent if that is not known), `first_loss` and `last_loss` (of
    the first and last step, in nats per token), and on a GPU `peak_gb` (peak memory in GB).
    """
    recipe = read_recipe(bench.sizes["recipe"])
    config = setup.model_config(recipe.model, recipe.data.context, {})
    with bench.device:
        model = setup.build_model(config, recipe.train).train()
    if compiled:
        compile_blocks(model, bench.sizes["backend"])
    tokens = bench.sizes["tokens"]
    given = {k: v.repeat(rows, 1) for k, v in row(tokens, config.vocab_size, str(bench.device)).items()}
    optimizer = optimizer_of(model, recipe)
    done = [step(model, optimizer, given, recipe, bench.device.type) for _ in range(WARM_UP + bench.sizes["rounds"])]
    taken = statistics.median(sum(each["seconds"].values()) for each in done[WARM_UP:])
    flops = model.cost(tokens=tokens, routing="oracle").training.total * rows
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "ms": taken * 1e3,
        "tokens_per_second": rows * tokens / taken,
        "tflops_per_second": flops / taken / 1e12,
        **share_of_peak("mfu", flops, taken * 1e3),
        "first_loss": done[0]["loss"],
        "last_loss": done[-1]["loss"],
        **bench.peak(),
    }
