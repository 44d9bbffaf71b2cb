"""Bytes of weights that a decoding step of one row reads."""

from __future__ import annotations

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import Flops


def of_step(model: SkipstoneForCausalLM, flops: Flops, by_candidates: bool) -> float:
    """Return the bytes of weights that a decoding step of one row reads, estimated from the FLOPs of its token.

    Each multiplied weight counts 2 FLOPs and is read once. model: supplies the mean number of bytes of a block's weight
    (quantised weights with their scales) and the output head. flops: the FLOPs of one token, of which only the FLOPs of
    blocks and routers are used. by_candidates: whether the model's low-rank preview (`model.head_preview`) selects a
    few candidate tokens, whose rows are all that is read of the head; ignored for a model without a preview. The
    token's row of the embedding is not counted.
    """
    blocks = list(model.decoder.layers.parameters())
    each = sum(p.numel() * p.element_size() for p in blocks) / max(sum(p.numel() for p in blocks if p.dim() == 2), 1)
    return (flops.linear + flops.router) / 2 * each + head_bytes(model, by_candidates)


def head_bytes(model: SkipstoneForCausalLM, by_candidates: bool = True) -> float:
    """Return the bytes of weights that computing the logits of one token reads.

    model: supplies the output head and its preview. by_candidates: whether the model's low-rank preview
    (`model.head_preview`) selects a few candidate tokens; then the preview and the rows of these tokens in the head are
    counted. If it is False, or if the model has no preview, the whole head is counted.
    """
    if by_candidates and model.head_preview is not None:
        return float(model.head_preview.bytes_read(model.lm_head))
    return float(sum(p.numel() * p.element_size() for p in model.lm_head.parameters()))
