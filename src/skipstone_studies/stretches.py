"""Two runs compared on the same text: losses by stretches of the validation set, differences with their interval.

A stretch is a batch of neighbouring windows: text near by is alike, so single windows are not independent of each
other. The bootstrap draws seeds and stretches, each with replacement; all seeds are judged by the same stretches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from skipstone.evaluate.loaded_run import LoadedRun, batches, load_run
from skipstone.measure.losses import measure_loss

WINDOWS = 64  # of a stretch
DRAWS = 4000
SHARE = 0.9  # of the draws lie in the interval


def stretches(folder: Path) -> list[float]:
    """Loss in nats of each stretch, in the order of the text, of the pass that stands for the model."""
    return list(of(load_run(folder)))


def of(loaded: LoadedRun) -> Iterator[float]:
    """As `stretches`, of a model that is open."""
    assert loaded.data is not None
    for batch in batches(loaded.data, WINDOWS, loaded.model.device):
        yield measure_loss(loaded.model, loaded.primary, [batch], activations=False).loss


def interval(differences: Mapping[int, Sequence[float]]) -> tuple[float, float]:
    """Where the mean difference lies in `SHARE` of the draws. differences: of each seed, one a stretch."""
    found_SW = torch.tensor(list(differences.values()), dtype=torch.double)
    seeds, windows = found_SW.shape
    generator = torch.Generator().manual_seed(0)
    seed_DS = torch.randint(seeds, (DRAWS, seeds), generator=generator)
    window_DW = torch.randint(windows, (DRAWS, windows), generator=generator)
    by_seed_DW = found_SW[seed_DS].mean(1)
    means_D = by_seed_DW.gather(1, window_DW).mean(1).sort().values
    edge = round((1 - SHARE) / 2 * DRAWS)
    return float(means_D[edge]), float(means_D[-1 - edge])
