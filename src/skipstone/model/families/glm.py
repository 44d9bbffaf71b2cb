"""How GLM-4 checkpoints are translated to our configuration and tensor names.

RoPE rotates pairs of neighbouring features in a part of each head; gate and up projection are one matrix.

The models of 2024 (`glm`) have norms before the sub-layers, those of 2025 (`glm4`) before and after.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig

from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import Family, Fused, Layout, Options, llama_like, llama_like_back, rope_back


def _glm(theirs: PreTrainedConfig) -> Options:
    return {**llama_like(theirs, partial=True), "attention_bias": theirs.attention_bias}


def _glm4(theirs: PreTrainedConfig) -> Options:
    return {**_glm(theirs), "norm_placement": "around"}


def _glm_back(config: SkipstoneConfig, activation: str) -> Options:
    # without a factor, transformers turns half of each head
    rope = {"partial_rotary_factor": 1.0, **rope_back(config)}
    return {**llama_like_back(config, activation), "head_dim": config.head_size, "rope_parameters": rope}


LAYOUT = Layout(
    fused={"gate_up_proj": Fused(parts=("gate_proj", "up_proj"), split=lambda x, config: list(x.chunk(2)))},
    interleaved=("q_proj", "k_proj"),
)
GLM4_NAMES = {
    ".post_self_attn_layernorm.": ".attention_output_layernorm.",
    ".post_mlp_layernorm.": ".mlp_output_layernorm.",
}
GLM = Family(read=_glm, write=_glm_back, layout=LAYOUT)
GLM4 = Family(read=_glm4, write=_glm_back, layout=replace(LAYOUT, names=GLM4_NAMES))
