"""Validation during training: the loss with routing as in training (oracle) and without later tokens (causal)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict
from skipstone.data.prepare import PreparedData
from skipstone.data.rows import IGNORE, Row
from skipstone.measure.passes import targets
from skipstone.measure.record_meter import RecordMeter


def batches(
    data: PreparedData, rows: int | None, size: int, part: int = 0, parts: int = 1
) -> Iterator[tuple[Row, bool]]:
    """Yield batches of validation rows, each with whether it counts; several processes take turns by batches.

    A batch is a dict of int64 tensors [rows, tokens] by name. data: provides the validation rows. rows: number of rows
    to use, from the first; None means all of them. size: rows of a batch. part: index of this process, out of `parts`.
    Every process yields equally many batches, because sharded models need all processes in every pass: a process that
    has no rows left yields the first rows again, with False.
    """
    count = min(rows or len(data.validation), len(data.validation))
    for begin in range(0, count, parts * size):
        start = begin + part * size
        counts = start < count
        first = start if counts else 0
        yield data.collate(data.validation.__getitems__(list(range(first, min(first + size, count))))), counts


@torch.no_grad()
def loss_sums(
    model: Any,
    rows: Iterator[tuple[Row, bool]],
    routing: Callable[[Row], object],
    device: torch.device,
    meter: RecordMeter,
    loss_chunk: int = 0,
) -> Tensor:
    """Return the cross-entropy in nats summed over all predictions, and the number of predictions: fp64 [2].

    The passes compute only kept tokens, without exploration noise. model: the model, which is called with each batch.
    rows: pairs of a batch and whether it counts; a batch that does not is run, so that all processes make the same
    passes, but adds nothing to the sums or to the meter's means. routing: a function that returns forward's argument
    `routing` for a batch. device: the model's device. meter: the meter to which the decisions of every pass are added.
    loss_chunk: number of tokens whose logits exist at a time; 0 means all of them.
    """
    asked: PlainDict = {"noise": False, "use_cache": False, "output_records": True, "loss_chunk": loss_chunk}
    total = torch.zeros(2, dtype=torch.float64, device=device)
    for batch, counts in rows:
        batch = {name: value.to(device) for name, value in batch.items()}
        out = model(**batch, **asked, routing=routing(batch), num_items_in_batch=1)
        total[0] += out.token_loss * counts
        total[1] += predictions(batch) * counts
        meter.add(model.routing_modules(), out.records, counts)
    return total


def predictions(batch: Row) -> Tensor:
    """Return how many tokens of a batch (tensors by name) have a target, as an integer tensor []."""
    return (targets(batch) != IGNORE).sum()
