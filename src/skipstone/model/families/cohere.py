"""How checkpoints of Cohere's Command R, Aya and Command A are translated to our configuration and names.

Attention and MLP run in parallel after one norm, and logits are scaled.

RoPE rotates pairs of neighbouring features. Command R+ has a norm of queries and keys with a weight for each head; in
Command R7B and Command A (`cohere2`), the blocks with a sliding window have RoPE and the others have no positions.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from skipstone.core.strict import choose
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import (
    ACTIVATIONS,
    Family,
    Layout,
    Options,
    layer_types,
    rope_back,
    shared,
    whole_rope,
    window_back,
    windows,
)


def _both(theirs: PreTrainedConfig) -> Options:
    return {
        **shared(theirs),
        "intermediate_size": theirs.intermediate_size,
        "num_key_value_heads": theirs.num_key_value_heads,
        "norm": "layernorm_without_bias",
        "norm_eps": theirs.layer_norm_eps,
        "norm_placement": "shared",
        "parallel_residual": True,
        "rope_parameters": whole_rope(theirs.rope_parameters),
        "attention_bias": theirs.attention_bias,
        "attention_output_bias": theirs.attention_bias,
        "attention_dropout": theirs.attention_dropout or 0.0,
        "activation": choose("hidden_act", theirs.hidden_act, ACTIVATIONS),
        "logit_scale": theirs.logit_scale,
    }


def _both_back(config: SkipstoneConfig, activation: str) -> Options:
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "layer_norm_eps": config.norm_eps,
        "rope_parameters": rope_back(config),
        "attention_bias": config.attention_bias,
        "attention_dropout": config.attention_dropout,
        "hidden_act": activation,
        "logit_scale": config.logit_scale,
    }


def _cohere(theirs: PreTrainedConfig) -> Options:
    norm = {"qk_norm": True, "qk_norm_over": "each_head"} if theirs.use_qk_norm else {}
    return {**_both(theirs), **norm}


def _cohere_back(config: SkipstoneConfig, activation: str) -> Options:
    return {**_both_back(config, activation), "use_qk_norm": config.qk_norm}


def _cohere2(theirs: PreTrainedConfig) -> Options:
    windowed = [i for i, kind in enumerate(theirs.layer_types) if kind == "sliding_attention"]
    return {**_both(theirs), **windows(theirs), "rope_layers": windowed}


def _cohere2_back(config: SkipstoneConfig, activation: str) -> Options:
    return {
        **_both_back(config, activation),
        "sliding_window": window_back(config),
        "layer_types": layer_types(config),
    }


LAYOUT = Layout(interleaved=("q_proj", "k_proj", "q_norm", "k_norm"))
COHERE = Family(read=_cohere, write=_cohere_back, layout=LAYOUT)
COHERE2 = Family(read=_cohere2, write=_cohere2_back, layout=LAYOUT)
