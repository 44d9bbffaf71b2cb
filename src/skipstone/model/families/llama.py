"""How checkpoints of Llama and of families like it are translated to our configuration and tensor names.

Mistral, Ministral, Qwen2, Qwen3, SmolLM3 and Granite differ from Llama in single options.
"""

from __future__ import annotations

from transformers import PreTrainedConfig

from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import (
    Family,
    Options,
    layer_types,
    llama_like,
    llama_like_back,
    window_back,
    windows,
)


def _biases(theirs: PreTrainedConfig) -> Options:
    return {"attention_bias": theirs.attention_bias, "attention_output_bias": theirs.attention_bias}


def _llama(theirs: PreTrainedConfig) -> Options:
    return {**llama_like(theirs), **_biases(theirs), "mlp_bias": theirs.mlp_bias}


def _mistral(theirs: PreTrainedConfig) -> Options:
    return {**llama_like(theirs), **windows(theirs)}


def _mistral_back(config: SkipstoneConfig, activation: str) -> Options:
    return {**llama_like_back(config, activation), "sliding_window": config.attention_window}


def _ministral_back(config: SkipstoneConfig, activation: str) -> Options:
    types = {"sliding_window": window_back(config), "layer_types": layer_types(config)}
    return {**llama_like_back(config, activation), **types}


def _qwen2(theirs: PreTrainedConfig) -> Options:
    return {**llama_like(theirs), **windows(theirs), "attention_bias": True}


def _qwen3(theirs: PreTrainedConfig) -> Options:
    return {**llama_like(theirs), **windows(theirs), **_biases(theirs), "qk_norm": True}


def _qwen_back(config: SkipstoneConfig, activation: str) -> Options:
    slides = config.attention_window is not None
    window = {"use_sliding_window": slides, "sliding_window": config.attention_window}
    return {**llama_like_back(config, activation), **window, "layer_types": layer_types(config)}


def _smollm3(theirs: PreTrainedConfig) -> Options:
    turned = [i for i, rope in enumerate(theirs.no_rope_layers[: theirs.num_hidden_layers]) if rope]
    return {
        **_llama(theirs),
        **windows(theirs),  # its class masks by layer_types alone, whatever use_sliding_window says
        "rope_layers": None if len(turned) == theirs.num_hidden_layers else turned,
    }


def _smollm3_back(config: SkipstoneConfig, activation: str) -> Options:
    turned = config.rotary_layers()
    no_rope = {"no_rope_layers": [int(i in turned) for i in range(config.num_hidden_layers)]}
    return {**_qwen_back(config, activation), **no_rope}


def _granite(theirs: PreTrainedConfig) -> Options:
    return {
        **_llama(theirs),
        "embedding_scale": theirs.embedding_multiplier,
        "residual_scale": theirs.residual_multiplier,
        "attention_scale": theirs.attention_multiplier,
        "logit_scale": 1 / theirs.logits_scaling,
    }


def _granite_back(config: SkipstoneConfig, activation: str) -> Options:
    return {
        **llama_like_back(config, activation),
        "embedding_multiplier": config.embedding_scale,
        "residual_multiplier": config.residual_scale,
        "attention_multiplier": config.head_size**-0.5 if config.attention_scale is None else config.attention_scale,
        "logits_scaling": 1 / config.logit_scale,
    }


LLAMA = Family(read=_llama, write=llama_like_back)
MISTRAL = Family(read=_mistral, write=_mistral_back)
MINISTRAL = Family(read=_mistral, write=_ministral_back)
QWEN2 = Family(read=_qwen2, write=_qwen_back)
QWEN3 = Family(read=_qwen3, write=_qwen_back)
SMOLLM3 = Family(read=_smollm3, write=_smollm3_back)
GRANITE = Family(read=_granite, write=_granite_back)
