"""Losses by blocks of the validation text, so that two runs are compared on the same text.

A block is a batch of neighbouring windows: text near by is alike, so single windows are not independent of each other.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.measure.losses import measure_loss

WINDOWS = 64  # of a block
RECORDED = "stretches"  # the name that the losses by block have always had in records


def block_losses(folder: Path) -> list[float]:
    """Loss in nats of each block, in the order of the text, of the pass that stands for the model."""
    return list(of_loaded(load_run(folder)))


def of_loaded(loaded: LoadedRun) -> Iterator[float]:
    """Yield what `block_losses` lists, for a model that is loaded already."""
    assert loaded.data is not None
    for batch in batches(loaded.data, WINDOWS, loaded.model.device):
        yield measure_loss(loaded.model, loaded.primary, [batch], activations=False).loss
