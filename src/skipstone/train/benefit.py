"""Measure what a block's update of a token is worth, for routers that learn it (option `benefit` of Mixture-of-Depths).

    benefit_i = loss_i of a pass that skips token i in the block - loss_i of one that keeps it

Two passes without gradients over one row in `ONE_IN` keep one half of its tokens each, drawn at random, in one of the
blocks whose routers learn the benefit; these blocks take turns from step to step. Both passes together cost an eighth
of a forward pass. All other decisions of these passes are causal. Skipped tokens give keys and values if the block's
option `kv` is "full".

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
    """Return the model's depth mechanisms whose routers are trained to predict the benefit of their blocks.

    The benefit of a token is the amount by which its loss falls because the block updates it.
    """
    return [m for block in model.decoder.layers for m in block.mechanisms.values() if m.learns_benefit]


@torch.no_grad()
def measure_benefit(model: SkipstoneForCausalLM, batch: Mapping[str, Tensor], step: int) -> dict[int, Tensor]:
    """Measure by how much the update of one block lowers the loss of each token, for some rows of a batch.

    Two passes without gradients read a sixteenth of the rows (`ONE_IN`), at least one row. One block updates a random
    half of the tokens in the first pass, and the other half in the second. The benefit of a token is its loss in nats
    when skipped minus its loss when kept.

    model: the model whose routers may learn the benefit. batch: input_ids and labels (or shift_labels), [B, T] each,
    and optionally attention_mask, position_ids and document_ids. step: the optimizer step; it chooses the block (blocks
    take turns) and seeds the random halves. Returns {index of the block: benefit, fp32 [B, T]}, NaN for rows that were
    not measured and tokens without a label. The dict is empty if no router learns the benefit or the batch has no
    labels. For batches of fewer than 16 rows it is also empty in most steps, so that on average one row in 16 is
    measured.
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
    """Measure by how much a block lowers the loss of each token, and provide it to passes inside a `with` block.

    The values are put into `model.decoder.benefits`, from which routers read their targets: {index of the block:
    benefit in nats, fp32 [B, T]}, NaN where it was not measured. The dict is emptied on leaving. model: the model whose
    routers may learn the benefit; without such routers nothing is measured. batch: the training batch, by name. step:
    the optimizer step, which chooses the block and seeds the measurement.
    """
    model.decoder.benefits = measure_benefit(model, batch, step)
    try:
        yield
    finally:
        model.decoder.benefits = {}
