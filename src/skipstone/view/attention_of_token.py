"""What a token attends to, computed by one more pass over the text up to it that keeps its attention weights.

The pass computes all tokens in every block and discards the updates of skipped ones ("masked" execution). So every
token stays in its column, and weights can be told apart by token also in blocks that skip some. Blocks with an
attention window compute attention in bands: chunks of queries, each with the keys of its own and of the previous chunk.

Shape letters: B rows (one, or one for each band), H heads, K queries, C columns of keys, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from skipstone.core.records import DepthRecord, Records, of_kind
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.nn.attention import CAPPING, eager_attention
from skipstone.nn.block import Block

WATCHED = "skipstone_watched"  # name of the attention implementation during the pass


@torch.no_grad()
def attention_of_last(model: SkipstoneForCausalLM, ids: Sequence[int]) -> list[list[float] | None]:
    """Return, for each block, the attention weights of the last of `ids` to all of them, averaged over heads.

    model: a Skipstone model in evaluation mode. ids: token ids of one text, for which one pass without a cache is
    computed; decisions look at no later token, noise is off. An entry of the result has len(ids) weights, which sum to
    1 and are 0 beyond the block's attention window; it is None for a block whose attention the last token skips.
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
        rows[int(module.layer_idx)] = _last_row(weight_BHKC.float().mean(1), len(ids)).tolist()  # type: ignore[call-overload, arg-type]
        return y_BKHE, weight_BHKC

    config, usual = model.config, model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(WATCHED, watched)
    try:
        config._attn_implementation = WATCHED
        CAPPING.add(WATCHED)
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
        CAPPING.discard(WATCHED)
    assert out.records is not None
    took = [_took(block, records) for block, records in zip(model.decoder.layers, out.records, strict=True)]
    return [rows.get(layer) if each else None for layer, each in enumerate(took)]


def _last_row(weight_BKC: Tensor, tokens: int) -> Tensor:
    """Return the attention weights of the last token to all of them, [T], also of a block that attends in bands.

    weight_BKC: weights, mean over heads. A band is a chunk of K queries, whose C = 2 K keys are those of the chunk
    before and its own. tokens: T.
    """
    window = weight_BKC.shape[1]
    if window == tokens:
        return weight_BKC[0, -1]
    chunk, at = divmod(tokens - 1, window)
    near_C = weight_BKC[chunk, at]
    row_C = torch.zeros((chunk + 1) * window, dtype=near_C.dtype, device=near_C.device)
    row_C[max(chunk - 1, 0) * window :] = near_C[-min(chunk + 1, 2) * window :]
    return row_C[:tokens]


def _took(block: Block, records: Records) -> bool:
    """Return whether all mechanisms around a block's attention kept the last token.

    records: those of the block, by mechanism name.
    """
    decided = of_kind(records, DepthRecord)
    names = [name for site, of_site in block.sites.items() if site != "mlp" for name in of_site]
    return all(name in decided and bool(decided[name].kept_BT.expand(1, -1)[0, -1]) for name in names)
