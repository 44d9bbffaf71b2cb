"""How checkpoints of GPT-NeoX and Pythia are translated to our configuration and tensor names.

They have attention and MLP in parallel, rotary positions on a part of each head, LayerNorm and biases.

Queries, keys and values are one projection, in which those of each head are adjacent.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedConfig

from skipstone.core.strict import choose
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import ACTIVATIONS, Family, Fused, Layout, Options, rope_back, shared


def _read(theirs: PreTrainedConfig) -> Options:
    return {
        **shared(theirs),
        "intermediate_size": theirs.intermediate_size,
        "norm": "layernorm",
        "norm_eps": theirs.layer_norm_eps,
        "parallel_residual": theirs.use_parallel_residual,
        "rope_parameters": dict(theirs.rope_parameters),
        "mlp": "plain",
        "mlp_bias": True,
        "attention_bias": theirs.attention_bias,
        "attention_output_bias": theirs.attention_bias,
        "activation": choose("hidden_act", theirs.hidden_act, ACTIVATIONS),
        "embedding_dropout": theirs.hidden_dropout,
        "attention_dropout": theirs.attention_dropout,
        "residual_dropout": theirs.hidden_dropout,
    }


def _write(config: SkipstoneConfig, activation: str) -> Options:
    return {
        "intermediate_size": config.intermediate_size,
        "layer_norm_eps": config.norm_eps,
        "use_parallel_residual": config.parallel_residual,
        "rope_parameters": {"partial_rotary_factor": 1.0, **rope_back(config)},
        "attention_bias": config.attention_bias,
        "hidden_act": activation,
        "attention_dropout": config.attention_dropout,
        "hidden_dropout": config.residual_dropout,
    }


def _apart(x: Tensor, config: SkipstoneConfig) -> list[Tensor]:
    by_head = x.unflatten(0, (config.num_attention_heads, 3, config.head_size))
    return [by_head[:, i].flatten(0, 1) for i in range(3)]


def _together(parts: list[Tensor], config: SkipstoneConfig) -> Tensor:
    by_head = [part.unflatten(0, (config.num_attention_heads, config.head_size)) for part in parts]
    return torch.stack(by_head, dim=1).flatten(0, 2)


GPT_NEOX = Family(
    read=_read,
    write=_write,
    layout=Layout(
        names={
            "gpt_neox.embed_in.": "model.embed_tokens.",
            "gpt_neox.final_layer_norm.": "model.norm.",
            "gpt_neox.layers.": "model.layers.",
            ".attention.q_proj.": ".self_attn.q_proj.",
            ".attention.k_proj.": ".self_attn.k_proj.",
            ".attention.v_proj.": ".self_attn.v_proj.",
            ".attention.dense.": ".self_attn.o_proj.",
            ".mlp.dense_h_to_4h.": ".mlp.up_proj.",
            ".mlp.dense_4h_to_h.": ".mlp.down_proj.",
        },
        fused={"query_key_value": Fused(parts=("q_proj", "k_proj", "v_proj"), split=_apart, join=_together)},
    ),
)
