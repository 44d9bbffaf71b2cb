"""The loss on rows that are evenly spaced over a split, in the pass that really skips, by blocks of rows.

Also the share of tokens that routed blocks keep there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

from torch import Tensor

from skipstone.data.prepare import PreparedData
from skipstone.measure.losses import LossResult, measure_loss
from skipstone.measure.passes import PASSES
from skipstone.model.causal_lm import SkipstoneForCausalLM

BATCH = 16  # rows of a pass
BLOCKS = 32  # of text, for the part of an interval that comes from the text


def spaced(total: int, count: int | None) -> list[int]:
    """Return `count` indices that are evenly spaced in range(total); all of them if count is None or too large."""
    if count is None or count >= total:
        return list(range(total))
    return [i * total // count for i in range(count)]


def rows(data: PreparedData, indices: Sequence[int], size: int = BATCH) -> Iterator[dict[str, Tensor]]:
    """Yield the validation rows with these indices as batches of at most `size` rows, on the CPU.

    data: prepared data, of which `validation` is read. A batch holds tensors [rows, tokens] by name.
    """
    for start in range(0, len(indices), size):
        yield dict(data.collate(data.validation.__getitems__(list(indices[start : start + size]))))


def by_block(
    model: SkipstoneForCausalLM, data: PreparedData, count: int | None, blocks: int = BLOCKS
) -> list[LossResult]:
    """Return the losses on evenly spaced validation rows, one result for each of at most `blocks` parts of these rows.

    The rows of a part follow each other. model: the model; tokens are skipped as in generation. data: prepared data, of
    which `validation` is read. count: how many rows; None means all.
    """
    chosen = spaced(len(data.validation), count)
    parts = min(blocks, len(chosen))
    ends = [len(chosen) * i // parts for i in range(parts + 1)]
    return [
        measure_loss(model, PASSES["executed"], rows(data, chosen[start:end]), activations=False)
        for start, end in pairwise(ends)
    ]


def mean_loss(model: SkipstoneForCausalLM, data: PreparedData, count: int | None) -> float:
    """Return the loss in nats per prediction on evenly spaced validation rows, skipping tokens as in generation.

    model: the model. data: prepared data, of which `validation` is read. count: how many rows; None means all.
    """
    (found,) = by_block(model, data, count, 1)
    return found.loss


def capacities(parts: Sequence[LossResult]) -> dict[str, float]:
    """Return the share of tokens that each routed block of a model keeps over all parts of a text.

    Keys are the blocks' indices as text, such as "2"; blocks without a depth mechanism are missing. A mechanism's share
    is the mean of its shares on the parts, weighted by their numbers of predictions; parts where no token reached it do
    not count. Of several mechanisms in a block, the smallest share counts. parts: what `by_block` returned.
    """
    shares: dict[tuple[int, str], list[tuple[int, float]]] = {}
    for part in parts:
        for i, layer in enumerate(part.summaries.layers()):
            for name, figures in layer.items():
                if figures.get("capacity") is not None:
                    shares.setdefault((i, name), []).append((part.predictions, figures["capacity"]))
    found: dict[str, float] = {}
    for (i, _), weighted in sorted(shares.items()):
        kept = sum(weight * share for weight, share in weighted) / sum(weight for weight, _ in weighted)
        found[str(i)] = min(kept, found.get(str(i), kept))
    return found
