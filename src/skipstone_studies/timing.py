"""Timing of training steps and forward passes of several models in turns, so that changes of speed affect all alike."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import torch

from skipstone.core.strict import PlainDict
from skipstone.data.rows import Row
from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.measure.passes import forced_routing, inputs_of
from skipstone.measure.speed import Lap, Task, take_turns
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.runs import Run

ROUNDS = 7  # timed steps of each model, after one warm-up step


def training_speeds(runs: Mapping[str, Path], rounds: int = ROUNDS) -> dict[str, PlainDict]:
    """Time training steps of each run's model on the rows of its own recipe, in turns; return speeds by arm.

    runs: the run folder of each arm (compared recipe). rounds: number of timed steps of each. A step is forward,
    backward, clipping and optimizer. The result has for each arm: `tokens_per_second`, the median over steps; `spread`,
    half of the range over steps divided by the median; `rounds`, their number.
    """
    rates = take_turns({arm: training_step(Run(folder)) for arm, folder in runs.items()}, rounds)
    return {
        arm: {"tokens_per_second": rate.tokens_per_second, "spread": rate.spread, "rounds": rounds}
        for arm, rate in rates.items()
    }


def forward_speeds(runs: Mapping[str, Path], rows: int = 64, rounds: int = ROUNDS) -> dict[str, PlainDict]:
    """Time forward passes over `rows` validation rows without a cache, taking turns; return speeds by arm.

    runs: the run folder of each arm (compared recipe). rounds: number of timed passes of each. The result is {arm:
    {"forward": {"tokens_per_second": median over passes, "spread": half of the range divided by the median, "rounds":
    their number}}}.
    """
    rates = take_turns({arm: forward_pass(load_run(folder), rows) for arm, folder in runs.items()}, rounds)
    return {
        arm: {"forward": {"tokens_per_second": rate.tokens_per_second, "spread": rate.spread, "rounds": rounds}}
        for arm, rate in rates.items()
    }


def forward_pass(loaded: LoadedRun, rows: int) -> Task:
    """Return a function that times one forward pass over the first `rows` validation rows of a loaded run.

    It has no arguments and returns a `Lap`. The pass really skips tokens if the model can decide without later ones;
    else it is routed as in training.
    """
    assert loaded.data is not None
    batch = next(batches(loaded.data, rows, loaded.model.device))

    def lap() -> Lap:
        start = time.perf_counter()
        loaded.primary.run(loaded.model, batch)
        if loaded.model.device.type == "cuda":
            torch.cuda.synchronize()
        return Lap(tokens=batch["input_ids"].numel(), seconds=time.perf_counter() - start, joules=None)

    return lap


def training_step(run: Run) -> Task:
    """Return a function that times one training step of a run's model: forward, backward, clipping and AdamW.

    It has no arguments and returns a `Lap`. It uses the recipe's rows, micro-batches, precision, compilation and
    routing, and a learning rate so small that routing stays as trained.
    """
    recipe = run.config()["train"]
    device = torch.device("cuda" if torch.cuda.is_available() and recipe.get("device") != "cpu" else "cpu")
    model = run.load_model().to(device).train()  # type: ignore[arg-type]
    if recipe.get("activation_checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if recipe.get("compile"):
        for block in model.model.layers:
            block.compile()
    batches = _micro_batches(run, recipe["batch_size"], recipe.get("gradient_accumulation", 1), device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)  # so small that routing stays as trained
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    forward = [_arguments(model, batch, recipe.get("routing", "learned")) for batch in batches]

    def step() -> Lap:
        start = time.perf_counter()
        for arguments in forward:
            with torch.autocast(device.type, torch.bfloat16, enabled=recipe.get("precision") == "bf16"):
                loss = model(**arguments).loss
            (loss / len(forward)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return Lap(tokens=tokens, seconds=time.perf_counter() - start, joules=None)

    return step


def _micro_batches(run: Run, rows: int, parts: int, device: torch.device) -> list[Row]:
    data = run.data(train=True)
    assert data.train is not None
    size = rows // parts
    made = [data.collate(data.train.__getitems__(range(i * size, (i + 1) * size))) for i in range(parts)]
    return [{name: x.to(device) for name, x in batch.items()} for batch in made]


def _arguments(model: SkipstoneForCausalLM, batch: Row, routing: str) -> PlainDict:
    """Return the arguments with which the trainer calls the model's forward.

    batch: the tensors of a batch by name. routing: the recipe's `train.routing`.
    """
    targets = "shift_labels" if "shift_labels" in batch else "labels"
    arguments: PlainDict = {**inputs_of(batch), targets: batch[targets]}
    if routing == "difficulty":
        arguments["routing"] = forced_routing(model, batch["difficulty"] >= 0)
    return arguments
