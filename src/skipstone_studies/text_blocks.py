"""Losses by blocks of the validation text, so that two runs are compared on the same text.

A block is 64 neighbouring windows (rows) of the text, because single windows of the same passage are not independent.
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

    folder: the run folder. It is measured in the pass that really skips tokens if the model can decide without later
    ones, else as routed in training.
    """
    return list(of_loaded(load_run(folder)))


def of_loaded(loaded: LoadedRun) -> Iterator[float]:
    """Yield the validation loss of each block of text (64 neighbouring windows) in nats per token, for a loaded run.

    It is measured in the pass that really skips tokens if the model can decide without later ones, else as routed in
    training. loaded: the run, with its validation rows.
    """
    assert loaded.data is not None
    for batch in batches(loaded.data, WINDOWS, loaded.model.device):
        yield measure_loss(loaded.model, loaded.primary, [batch], activations=False).loss
