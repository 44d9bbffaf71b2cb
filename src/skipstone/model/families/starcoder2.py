"""How StarCoder2 checkpoints are translated to our configuration and tensor names.

StarCoder2 has LayerNorm, biases, a plain MLP, RoPE, grouped heads and a sliding window.
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
    one_window,
    rope_back,
    shared,
    whole_rope,
)


def _read(theirs: PreTrainedConfig) -> Options:
    return {
        **shared(theirs),
        **one_window(theirs),
        "intermediate_size": theirs.intermediate_size,
        "num_key_value_heads": theirs.num_key_value_heads,
        "norm": "layernorm",
        "norm_eps": theirs.norm_epsilon,
        "rope_parameters": whole_rope(theirs.rope_parameters),
        "mlp": "plain",
        "mlp_bias": theirs.use_bias,
        "attention_bias": theirs.use_bias,
        "attention_output_bias": theirs.use_bias,
        "activation": choose("hidden_act", theirs.hidden_act, ACTIVATIONS),
        "embedding_dropout": theirs.embedding_dropout,
        "attention_dropout": theirs.attention_dropout,
        "residual_dropout": theirs.residual_dropout,
    }


def _write(config: SkipstoneConfig, activation: str) -> Options:
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "norm_epsilon": config.norm_eps,
        "rope_parameters": rope_back(config),
        "sliding_window": config.attention_window,
        "use_bias": config.attention_bias,
        "hidden_act": activation,
        "embedding_dropout": config.embedding_dropout,
        "attention_dropout": config.attention_dropout,
        "residual_dropout": config.residual_dropout,
    }


STARCODER2 = Family(
    read=_read, write=_write, layout=Layout(names={".mlp.c_fc.": ".mlp.up_proj.", ".mlp.c_proj.": ".mlp.down_proj."})
)
