"""How fast this machine trains a model, from a few passes over random tokens.

Forward and backward are timed by the row and the optimizer by the step, so that a large batch need not be run.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.train.config import Recipe
from skipstone.train.setup import build_model, model_config
from skipstone_studies.isoflop.grid import Grid, Shape

ROUNDS = 3  # timed, after one that warms up and sets the thresholds
ROW_LIMIT, PASS_LIMIT = 1e12, 1e11  # training FLOPs: a row with more is not timed, a pass has no more rows than this
PARAMETER_LIMIT = 250_000_000  # weights, gradients and both moments: 4 GB


@dataclass(frozen=True, kw_only=True)
class Pace:
    """Seconds of a row's forward and backward pass, and of an optimizer step. measured: False: taken from a smaller."""

    row: float
    optimizer: float
    measured: bool

    def step(self, batch: int) -> float:
        return batch * self.row + self.optimizer


def paces(grid: Grid) -> dict[Shape, Pace]:
    """Of every shape. Those that are too large to be timed get the FLOPs per second of the arm's largest that was.

    Raises ValueError when an arm's smallest is too large already.
    """
    found: dict[Shape, Pace] = {}
    batch, device = grid.base.train.batch_size, _device(grid.base)
    for arm in grid.spec.arms:
        last: Shape | None = None
        for size in grid.sizes:
            shape = grid.shape(arm, size)
            if shape.step_flops / batch <= ROW_LIMIT and shape.parameters <= PARAMETER_LIMIT:
                found[shape], last = _timed(grid.base, shape, device), shape
            elif last is None:
                raise ValueError(f"{arm} {size} is too large to be timed here; add a smaller size for the estimate")
            else:
                scale = shape.step_flops / last.step_flops
                before = found[last]
                found[shape] = Pace(row=before.row * scale, optimizer=before.optimizer * scale, measured=False)
    return found


def paces_at(grid: Grid, flops_per_second: float) -> dict[Shape, Pace]:
    """Of every shape on a machine that keeps up so many training FLOPs a second. Raises ValueError unless above 0."""
    if not 0 < flops_per_second < float("inf"):
        raise ValueError(f"FLOPs per second must be above 0, got {flops_per_second}")
    shapes = [grid.shape(arm, size) for arm in grid.spec.arms for size in grid.sizes]
    rows = grid.base.train.batch_size
    return {s: Pace(row=s.step_flops / rows / flops_per_second, optimizer=0.0, measured=True) for s in shapes}


def _device(base: Recipe) -> torch.device:
    accelerated = base.train.device == "auto" and torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() or torch.device("cpu") if accelerated else torch.device("cpu")


def _timed(base: Recipe, shape: Shape, device: torch.device) -> Pace:
    train, context = base.train, base.data.context
    config = model_config({"vocab_size": 256, **shape.model}, context, {})
    model = build_model(config, train).to(device).train()  # type: ignore[arg-type]
    rows = max(
        1, min(train.batch_size // train.gradient_accumulation, int(PASS_LIMIT * train.batch_size / shape.step_flops))
    )
    ids_BT = torch.randint(0, config.vocab_size, (rows, context), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    passes, steps = [], []
    for turn in range(ROUNDS + 1):
        begin = _now(device)
        with torch.autocast(device.type, torch.bfloat16, enabled=train.precision == "bf16"):
            out = model(input_ids=ids_BT, labels=ids_BT, output_records=True)
        _backward(out.loss)
        middle = _now(device)
        optimizer.step()
        optimizer.zero_grad()
        if turn == 0:
            _settle(model, out.records)
        else:
            passes.append((middle - begin) / rows)
            steps.append(_now(device) - middle)
    return Pace(row=statistics.median(passes), optimizer=statistics.median(steps), measured=True)


def _backward(loss: Tensor | None) -> None:
    assert loss is not None
    loss.backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _settle(model: SkipstoneForCausalLM, records: Any) -> None:
    """Thresholds follow the scores from here on; at their start they would keep far more than the capacity."""
    for mechanism in model.adjustables():
        record = records[mechanism.place.layer].get(mechanism.place.name)
        mechanism.advance(0.0, None if record is None else mechanism.statistics(record))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
