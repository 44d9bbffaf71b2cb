"""What a token attends to: one more pass over the text up to it, with an attention that keeps its last row of weights.

The pass is the masked executor's, in which every token stays in its column, so that weights belong to tokens also in
blocks that skip some.

Shape letters: B rows (one), H heads, K queries, C columns of keys, T tokens, L blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipstone.core.records import DepthRecord, Records, of_kind
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.nn.attention import eager_attention
from skipstone.nn.block import Block

WATCHED = "skipstone_watched"  # name of the attention implementation during the pass


@torch.no_grad()
def attention_of_last(model: SkipstoneForCausalLM, ids: Sequence[int]) -> list[list[float] | None]:
    """Return, for each block, the attention weights of the last of `ids` to all of them, means over heads.

    They sum to 1. None for a block whose attention the token skipped, and for one whose attention works in bands or
    caps its scores, which has no such row. The decisions are those of a causal pass, with noise off.
    """
    rows: dict[int, list[float]] = {}

    def watched(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float,
        **given: float,
    ) -> tuple[Tensor, Tensor]:
        y_BKHE, weight_BHKC = eager_attention(module, query, key, value, mask, scaling, **given)
        if weight_BHKC.shape[2:] == (len(ids), len(ids)):
            rows[int(module.layer_idx)] = weight_BHKC[0, :, -1].float().mean(0).tolist()  # type: ignore[call-overload, arg-type]
        return y_BKHE, weight_BHKC

    config, usual = model.config, model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(WATCHED, watched)
    try:
        config._attn_implementation = WATCHED
        out = model(
            input_ids=torch.tensor([list(ids)], device=model.device),
            routing="causal",
            noise=False,
            use_cache=False,
            executor="masked",
            output_records=True,
            logits_to_keep=1,
        )
    finally:
        config._attn_implementation = usual
    assert out.records is not None
    took = [_took(block, records) for block, records in zip(model.decoder.layers, out.records, strict=True)]
    return [rows.get(layer) if each else None for layer, each in enumerate(took)]


def _took(block: Block, records: Records) -> bool:
    """Return whether the last token took the attention of a block."""
    decided = of_kind(records, DepthRecord)
    names = [name for site, of_site in block.sites.items() if site != "mlp" for name in of_site]
    return all(name in decided and bool(decided[name].kept_BT.expand(1, -1)[0, -1]) for name in names)
