"""Losses by blocks of the validation text, so that two runs are compared on the same text.

A block is a batch of neighbouring windows, because single windows of the same passage are not independent.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.measure.losses import measure_loss

WINDOWS = 64  # windows per block
RECORDED = "stretches"  # name of the losses by block in records, kept from earlier releases


def block_losses(folder: Path) -> list[float]:
    """Return the validation loss of each block of text (64 neighbouring windows), in nats per token, in order.

    folder: the run folder. The loss is that of the pass that really skips, if the model can decide without later
    tokens.
    """
    return list(of_loaded(load_run(folder)))


def of_loaded(loaded: LoadedRun) -> Iterator[float]:
    """Yield the validation loss of each block of text (64 neighbouring windows) in nats per token, for a loaded run.

    The loss is that of the pass that really skips, if the model can decide without later tokens.
    """
    assert loaded.data is not None
    for batch in batches(loaded.data, WINDOWS, loaded.model.device):
        yield measure_loss(loaded.model, loaded.primary, [batch], activations=False).loss
