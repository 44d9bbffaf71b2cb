"""How checkpoints of OLMo 2 and 3 are translated to our configuration and tensor names.

They have norms after the sub-layers, not before them, and one norm over all heads of queries and of keys.

OLMo 3 has a sliding window in three of four blocks, and different RoPE parameters in blocks with and without one.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import (
    Family,
    Layout,
    Options,
    layer_types,
    llama_like,
    llama_like_back,
    ropes_by_type,
    ropes_by_type_back,
    window_back,
    windows,
)


def _read(theirs: PreTrainedConfig) -> Options:
    return {
        **llama_like(theirs),
        "norm_placement": "after",
        "qk_norm": True,
        "qk_norm_over": "all_heads",
        "attention_bias": theirs.attention_bias,
        "attention_output_bias": theirs.attention_bias,
    }


def _olmo3(theirs: PreTrainedConfig) -> Options:
    return {**_read(theirs), **windows(theirs), **ropes_by_type(theirs)}


def _olmo3_back(config: SkipstoneConfig, activation: str) -> Options:
    return {
        **llama_like_back(config, activation),
        **ropes_by_type_back(config),
        "sliding_window": window_back(config),
        "layer_types": layer_types(config),
    }


LAYOUT = Layout(
    names={
        ".post_attention_layernorm.": ".attention_output_layernorm.",
        ".post_feedforward_layernorm.": ".mlp_output_layernorm.",
    }
)
OLMO2 = Family(read=_read, write=llama_like_back, layout=LAYOUT)
OLMO3 = Family(read=_olmo3, write=_olmo3_back, layout=LAYOUT)
