"""How checkpoints of Gemma 2 and of Gemma 3's text model are translated to our configuration and tensor names.

Norms stand before and after each sub-layer and scale by 1 + w; embeddings are scaled, scores and logits have soft caps.
Blocks with and without a sliding window alternate; in Gemma 3, the two kinds of blocks have different RoPE parameters.
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

NAMES = {
    ".post_attention_layernorm.": ".attention_output_layernorm.",
    ".pre_feedforward_layernorm.": ".post_attention_layernorm.",
    ".post_feedforward_layernorm.": ".mlp_output_layernorm.",
}


def _gemma(theirs: PreTrainedConfig) -> Options:
    return {
        **llama_like(theirs, "hidden_activation"),
        **windows(theirs),
        "attention_bias": theirs.attention_bias,
        "attention_output_bias": theirs.attention_bias,
        "norm": "rmsnorm_offset",
        "norm_placement": "around",
        "embedding_scale": theirs.hidden_size**0.5,
        "attention_scale": theirs.query_pre_attn_scalar**-0.5,
        "attention_soft_cap": theirs.attn_logit_softcapping,
        "logit_soft_cap": theirs.final_logit_softcapping,
    }


def _gemma_back(config: SkipstoneConfig, activation: str) -> Options:
    scale = config.head_size**-0.5 if config.attention_scale is None else config.attention_scale
    scalar = scale**-2  # whole in every published model
    return {
        **llama_like_back(config, activation),
        "hidden_activation": activation,
        "query_pre_attn_scalar": round(scalar) if abs(scalar - round(scalar)) < 1e-6 * scalar else scalar,
        "attn_logit_softcapping": config.attention_soft_cap,
        "final_logit_softcapping": config.logit_soft_cap,
        "sliding_window": window_back(config),
        "layer_types": layer_types(config),
    }


def _gemma3(theirs: PreTrainedConfig) -> Options:
    return {
        **_gemma(theirs),
        **ropes_by_type(theirs),
        "qk_norm": True,
        "attention_soft_cap": None,  # transformers has the setting for Gemma 3 and never reads it
    }


def _gemma3_back(config: SkipstoneConfig, activation: str) -> Options:
    return {**_gemma_back(config, activation), **ropes_by_type_back(config)}


ONLY = {"use_bidirectional_attention": (False, None)}
GEMMA2 = Family(read=_gemma, write=_gemma_back, layout=Layout(names=NAMES), only=ONLY)
GEMMA3 = Family(read=_gemma3, write=_gemma3_back, layout=Layout(names=NAMES), only=ONLY)
