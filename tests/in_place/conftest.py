"""Tiny transformers decoders that `skipstone convert` does not support, with weights that make decisions differ."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CohereConfig,
    DeepseekV3Config,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    MixtralConfig,
    Qwen2VLConfig,
    Qwen3MoeConfig,
)

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "head_dim": 8}
LATENT = {
    "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16,
    "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8,
    "num_key_value_heads": 4, "first_k_dense_replace": 1,
}  # fmt: skip


def _qwen2_vl() -> Qwen2VLConfig:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    ends = dict(zip(("vision_start", "vision_end", "image", "video"), range(60, 64), strict=True))
    tokens = {f"{name}_token_id": value for name, value in ends.items()}
    return Qwen2VLConfig(text_config={**SIZES, "rope_parameters": rope}, vision_config=vision, **tokens)


def _llava() -> LlavaConfig:
    vision = {
        "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8,
        "patch_size": 4, "model_type": "clip_vision_model",
    }  # fmt: skip
    text = {**SIZES, "model_type": "llama"}
    return LlavaConfig(text_config=text, vision_config=vision, image_token_index=63, image_seq_length=4)


CONFIGS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaConfig(**SIZES),
    "mixtral": lambda: MixtralConfig(**SIZES, num_local_experts=4),  # a mixture of experts
    "qwen2_vl": _qwen2_vl,  # a text tower, with positions of three axes
    "llava": _llava,
    "cohere": lambda: CohereConfig(**SIZES),  # parallel attention and MLP
    "falcon": lambda: FalconConfig(**SIZES, alibi=False, new_decoder_architecture=True, num_kv_heads=2),  # a tuple
    "gpt2": lambda: GPT2Config(**SIZES, n_positions=64),  # keys and queries of one matrix, no rotary positions
    "gemma3": lambda: Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=4),  # a short sliding window
    "qwen3_moe": lambda: Qwen3MoeConfig(**SIZES, **EXPERTS),
    "deepseek3": lambda: DeepseekV3Config(**{**SIZES, **LATENT}),  # latent keys and values
}
SEEING = ("qwen2_vl", "llava")


def built(name: str, **changes: Any) -> Any:
    """Return the model `name` of `CONFIGS` in evaluation mode, with the same weights in every call."""
    torch.manual_seed(0)
    config = CONFIGS[name]()
    for key, value in changes.items():
        setattr(config, key, value)
    kind: Any = AutoModelForImageTextToText if name in SEEING else AutoModelForCausalLM
    model = kind.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(3, 60, (2, 10), generator=torch.Generator().manual_seed(1))


@pytest.fixture
def mask(ids: torch.Tensor) -> torch.Tensor:
    """Return an attention mask for `ids` whose first row is padded on the left."""
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    return mask
