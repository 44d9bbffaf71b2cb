"""How GPT-2 checkpoints are translated to our configuration and tensor names.

GPT-2 has LayerNorm, learned positions, a plain MLP and biases.

Its weights are stored [in, out]; queries, keys and values are one projection.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from skipstone.core.strict import choose
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import ACTIVATIONS, Family, Fused, Layout, Options, shared


def _read(theirs: PreTrainedConfig) -> Options:
    return {
        **shared(theirs),
        "intermediate_size": theirs.n_inner or 4 * theirs.hidden_size,
        "norm": "layernorm",
        "norm_eps": theirs.layer_norm_epsilon,
        "positions": "learned",
        "max_position_embeddings": theirs.max_position_embeddings,  # a RoPE in the file, if any, stretches nothing
        "mlp": "plain",
        "mlp_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "activation": choose("activation_function", theirs.activation_function, ACTIVATIONS),
        "embedding_dropout": theirs.embd_pdrop,
        "attention_dropout": theirs.attn_pdrop,
        "residual_dropout": theirs.resid_pdrop,
        "scaled_output_init": True,
    }


def _write(config: SkipstoneConfig, activation: str) -> Options:
    return {
        "n_inner": config.intermediate_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
    }


NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.wpe.": "model.positions.",
    "transformer.ln_f.": "model.norm.",
    "transformer.h.": "model.layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.q_proj.": ".self_attn.q_proj.",
    ".attn.k_proj.": ".self_attn.k_proj.",
    ".attn.v_proj.": ".self_attn.v_proj.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}
GPT2 = Family(
    read=_read,
    write=_write,
    layout=Layout(
        names=NAMES,
        fused={"c_attn": Fused(parts=("q_proj", "k_proj", "v_proj"), split=lambda x, config: list(x.chunk(3)))},
        transposed=("c_attn", "c_proj", "c_fc"),
    ),
    only={
        "scale_attn_weights": (True,),
        "scale_attn_by_inverse_layer_idx": (False,),
        "reorder_and_upcast_attn": (False,),
        "add_cross_attention": (False,),
    },
)
