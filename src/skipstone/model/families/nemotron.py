"""How checkpoints of Nemotron and Minitron are translated to our configuration and tensor names.

They have LayerNorm with the factor 1 + weight, a plain MLP with a squared ReLU, and RoPE on part of each head.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from skipstone.core.strict import choose
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import ACTIVATIONS, Family, Options, rope_back, shared


def _read(theirs: PreTrainedConfig) -> Options:
    return {
        **shared(theirs),
        "intermediate_size": theirs.intermediate_size,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": theirs.head_dim,
        "norm": "layernorm_offset",
        "norm_eps": theirs.norm_eps,
        "rope_parameters": dict(theirs.rope_parameters),
        "mlp": "plain",
        "mlp_bias": theirs.mlp_bias,
        "attention_bias": theirs.attention_bias,
        "attention_output_bias": theirs.attention_bias,
        "activation": choose("hidden_act", theirs.hidden_act, ACTIVATIONS),
        "attention_dropout": theirs.attention_dropout,
    }


def _write(config: SkipstoneConfig, activation: str) -> Options:
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "norm_eps": config.norm_eps,
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope_back(config)},  # without it, half of each head turns
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "hidden_act": activation,
        "attention_dropout": config.attention_dropout,
    }


NEMOTRON = Family(read=_read, write=_write)
