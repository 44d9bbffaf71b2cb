"""OLMo 2: norms after the sub-layers instead of before them, and one norm over all heads of queries and of keys."""

from __future__ import annotations

from transformers import PreTrainedConfig

from skipstone.model.families.base import Family, Layout, Options, llama_like, llama_like_back


def _read(theirs: PreTrainedConfig) -> Options:
    return {
        **llama_like(theirs),
        "norm_placement": "after",
        "qk_norm": True,
        "qk_norm_over": "all_heads",
        "attention_bias": theirs.attention_bias,
        "attention_output_bias": theirs.attention_bias,
    }


OLMO2 = Family(
    read=_read,
    write=llama_like_back,
    layout=Layout(
        names={
            ".post_attention_layernorm.": ".attention_output_layernorm.",
            ".post_feedforward_layernorm.": ".mlp_output_layernorm.",
        }
    ),
)
