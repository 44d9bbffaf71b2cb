"""Measure what a block's update of a token is worth, for routers that learn it (option `benefit`).

    benefit_i = loss_i of a pass that skips token i in the block - loss_i of one that keeps it

Two passes without gradients over one row in `ONE_IN` keep one half of its tokens each, drawn at random, in one of the
blocks whose routers want to know; the blocks take turns from step to step. Both passes together cost an eighth of a
forward pass. All other decisions of these passes are causal. Skipped tokens give keys and values as the block's `kv`
says.

Shape letters: B rows, T tokens, R measured rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from skipstone.core.depth import DepthModule
from skipstone.core.strict import PlainDict
from skipstone.measure.losses import token_nats
from skipstone.measure.passes import targets
from skipstone.model.causal_lm import IGNORED, SkipstoneForCausalLM

ONE_IN = 16  # rows
OF_ROWS = ("input_ids", "attention_mask", "position_ids", "document_ids", "labels", "shift_labels")


def wanting(model: SkipstoneForCausalLM) -> list[DepthModule]:
    """Return the mechanisms whose routers learn the benefit of their blocks."""
    return [m for block in model.decoder.layers for m in block.mechanisms.values() if m.learns_benefit]


@torch.no_grad()
def measure_benefit(model: SkipstoneForCausalLM, batch: Mapping[str, Tensor], step: int) -> dict[int, Tensor]:
    """Return the benefit of one block for some rows of a batch, fp32 [B, T] by block, in nats; NaN elsewhere.

    batch: input_ids and labels (or shift_labels), [B, T]. step: chooses the block, and draws the halves. Empty if no
    router learns it, without labels, and in most steps of batches of fewer than `ONE_IN` rows.
    """
    found = wanting(model)
    if not found or not ("labels" in batch or "shift_labels" in batch) or "input_ids" not in batch:
        return {}
    rows, length = batch["input_ids"].shape
    if rows < ONE_IN and step * rows % ONE_IN >= rows:
        return {}
    part: PlainDict = {name: batch[name][: max(rows // ONE_IN, 1)] for name in OF_ROWS if batch.get(name) is not None}
    measured, target_RT = len(part["input_ids"]), targets(part)
    turn = step // max(ONE_IN // rows, 1)
    layer, device = found[turn % len(found)].placement.layer, target_RT.device
    draws = torch.Generator().manual_seed(step)  # the trainer's own random numbers stay as they are
    kept_RT = (torch.rand(measured, length, generator=draws) < 0.5).to(device)
    given = {name: value for name, value in part.items() if name not in ("labels", "shift_labels")}
    was_training = model.training
    model.eval()
    losses = []
    for mask_RT in (kept_RT, ~kept_RT):
        logits = model(**given, routing={layer: mask_RT}, use_cache=False).logits
        losses.append(token_nats(logits, target_RT).float())
    model.train(was_training)
    gap_RT = torch.where(kept_RT, losses[1] - losses[0], losses[0] - losses[1])
    benefit_BT = torch.full((rows, length), float("nan"), device=device)
    benefit_BT[:measured] = gap_RT.masked_fill(target_RT == IGNORED, float("nan"))
    return {layer: benefit_BT}


@contextmanager
def measured_benefit(model: SkipstoneForCausalLM, batch: Mapping[str, Tensor], step: int) -> Iterator[None]:
    """Measure the benefit on a batch and give it to the model's passes inside a `with` block."""
    model.decoder.benefits = measure_benefit(model, batch, step)
    try:
        yield
    finally:
        model.decoder.benefits = {}
