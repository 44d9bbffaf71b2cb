"""How checkpoints of Phi-3 and Phi-4 are translated to our configuration and tensor names.

They are Llama with fused projections, partial rotary embedding, a sliding window, and longrope.
"""

from __future__ import annotations

from torch import Tensor
from transformers import PreTrainedConfig

from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import (
    Family,
    Fused,
    Layout,
    Options,
    llama_like,
    llama_like_back,
    one_window,
)


def _read(theirs: PreTrainedConfig) -> Options:
    dropouts = {"embedding_dropout": theirs.embd_pdrop, "residual_dropout": theirs.resid_pdrop}
    return {**llama_like(theirs, partial=True), **one_window(theirs), **dropouts}


def _write(config: SkipstoneConfig, activation: str) -> Options:
    rope = config.rope_parameters or {}
    border = rope.get("original_max_position_embeddings")
    return {
        **llama_like_back(config, activation),
        **({} if border is None else {"original_max_position_embeddings": border}),
        "sliding_window": config.attention_window,
        "embd_pdrop": config.embedding_dropout,
        "resid_pdrop": config.residual_dropout,
    }


def _heads(x: Tensor, config: SkipstoneConfig) -> list[Tensor]:
    inner, grouped = config.num_attention_heads * config.head_size, config.key_value_heads * config.head_size
    return list(x.split([inner, grouped, grouped]))


PHI3 = Family(
    read=_read,
    write=_write,
    layout=Layout(
        fused={
            "qkv_proj": Fused(parts=("q_proj", "k_proj", "v_proj"), split=_heads),
            "gate_up_proj": Fused(parts=("gate_proj", "up_proj"), split=lambda x, config: list(x.chunk(2))),
        }
    ),
)
