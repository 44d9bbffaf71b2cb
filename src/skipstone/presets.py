"""Model configurations by name: `presets.get("polychromatic-0.6b")` returns one; keyword arguments replace values."""

from __future__ import annotations

from copy import deepcopy

from skipstone.core.strict import PlainDict, choose
from skipstone.model.config import SkipstoneConfig
from skipstone.model.released import polychromatic, tsa

# The base model of Token-Selective Attention (arXiv 2605.05222), as its released code builds and initialises it.
TSA_BASE: PlainDict = {
    **tsa.BASE,
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "mechanisms": [tsa.gate(tsa.LANGUAGE)],
}

LLAMA_3_2_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

PRESETS: dict[str, PlainDict] = {
    # Small enough for a test.
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
    },
    # Dense models whose sizes are published.
    "gpt2": {
        "vocab_size": 50_257,
        "hidden_size": 768,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "max_position_embeddings": 1024,
        "norm": "layernorm",
        "norm_eps": 1e-5,
        "positions": "learned",
        "mlp": "plain",
        "mlp_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "activation": "gelu_tanh",
        "embedding_dropout": 0.1,
        "attention_dropout": 0.1,
        "residual_dropout": 0.1,
        "scaled_output_init": True,
        "tie_word_embeddings": True,
    },
    "llama-3.2-1b": {
        "vocab_size": 128_256,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 131_072,
        "norm_eps": 1e-5,
        "rope_parameters": LLAMA_3_2_ROPE,
        "tie_word_embeddings": True,
    },
    "qwen3-0.6b": {
        "vocab_size": 151_936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "qk_norm": True,
        "tie_word_embeddings": True,
    },
    # Mixture-of-Depths (arXiv 2404.02258): the paper gives 220M parameters, every other block, capacity 12.5 % and
    # context 2048, but neither width nor depth; these are ours.
    "mod-220m": {
        "vocab_size": 50_257,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "mechanisms": [
            {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.125, "decision": "predictor", "weight": "raw"}
        ],
    },
    "tsa-shakespeare": {
        **TSA_BASE,
        "vocab_size": 65,
        "max_position_embeddings": 128,
    },
    "tsa-enwik8": {
        **TSA_BASE,
        "vocab_size": 6064,
        "max_position_embeddings": 256,
    },
    # Copy and sort share one model: rows of 42 tokens (20 to copy or sort) in 64 positions, as in its code.
    "tsa-copy": {
        **TSA_BASE,
        "vocab_size": 32,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "mechanisms": [tsa.gate(tsa.SYNTHETIC)],
    },
    # PolychromaticLM (arXiv 2603.13347), with context "sequence" as published: it depends on later tokens and cannot
    # generate with a cache. Override `activation` with {"name": "polyglu"} for the causal form.
    "polychromatic-0.6b": {
        **polychromatic.BASE,
        "vocab_size": 151_669,
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "max_position_embeddings": 4096,
        "activation": {"name": "polyglu", "context": "sequence"},
    },
}


def names() -> list[str]:
    """Return the names of all presets, such as "tiny" and "gpt2"."""
    return list(PRESETS)


def get(name: str, **overrides: object) -> SkipstoneConfig:
    """Return the model configuration of a preset.

    name: the preset, one of `presets.names()`, such as "tiny". overrides: configuration keys that replace those of the
    preset, such as `num_hidden_layers=6`. Raises ValueError for an unknown name or key, naming the nearest one, and for
    invalid values.
    """
    return SkipstoneConfig.from_plain(deepcopy({**choose("preset", name, PRESETS), **overrides}))
