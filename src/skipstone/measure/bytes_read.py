"""Bytes of weights that a decoding step of one row reads."""

from __future__ import annotations

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.cost import Flops


def of_step(model: SkipstoneForCausalLM, flops: Flops, by_candidates: bool) -> float:
    """Return the bytes of weights that a token reads, for its FLOPs.

    In a step, a weight that is multiplied is read once. flops: of one token, which tell how many weights of the blocks
    are multiplied; the mean bytes of a weight are those of the model's blocks. by_candidates: whether the head is read
    by candidates. The row of the embedding is left out.
    """
    blocks = list(model.decoder.layers.parameters())
    each = sum(p.numel() * p.element_size() for p in blocks) / max(sum(p.numel() for p in blocks if p.dim() == 2), 1)
    return (flops.linear + flops.router) / 2 * each + head_bytes(model, by_candidates)


def head_bytes(model: SkipstoneForCausalLM, by_candidates: bool = True) -> float:
    """Return the bytes that the logits of one token read, by candidates if the model has them and it is asked."""
    if by_candidates and model.head_preview is not None:
        return float(model.head_preview.bytes_read(model.lm_head))
    return float(sum(p.numel() * p.element_size() for p in model.lm_head.parameters()))
