"""Families of pretrained decoders: how their configuration and their tensors are called here.

A family is one line of `FAMILIES`. Parameters are named as in Hugging Face Llama: four of the five map to themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from torch import Tensor
from transformers import PreTrainedConfig

from skipstone.core.strict import PlainDict, PlainMapping, choose
from skipstone.model.config import SkipstoneConfig

Options = PlainDict
Tensors = dict[str, Tensor]

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "tanh": "tanh",
}

# Settings that change what attention computes, with the one value that our attention has.
ONLY = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


@dataclass(frozen=True, kw_only=True)
class Family:
    """options: our configuration from theirs. tensors: their state dict under our names."""

    options: Callable[[PreTrainedConfig], Options]
    tensors: Callable[[Mapping[str, Tensor]], Tensors] = dict


def context_of(theirs: PreTrainedConfig) -> int:
    """Tokens that the model reads. YaRN stretches the context that it names, and configs often name the one before."""
    named: int = theirs.max_position_embeddings
    rope = getattr(theirs, "rope_parameters", None) or {}
    if rope.get("rope_type") != "yarn" or "original_max_position_embeddings" not in rope:
        return named
    return max(named, int(rope["original_max_position_embeddings"] * float(rope.get("factor") or 1)))


def _padding(theirs: PreTrainedConfig) -> int | None:
    """The padding id, or None where the file says -1 for that."""
    return None if theirs.pad_token_id is None or theirs.pad_token_id < 0 else theirs.pad_token_id


def _shared(theirs: PreTrainedConfig) -> Options:
    return {
        "vocab_size": theirs.vocab_size,
        "hidden_size": theirs.hidden_size,
        "num_hidden_layers": theirs.num_hidden_layers,
        "num_attention_heads": theirs.num_attention_heads,
        "max_position_embeddings": context_of(theirs),
        "initializer_range": theirs.initializer_range,
        "tie_word_embeddings": theirs.tie_word_embeddings,
        "use_cache": theirs.use_cache,
        "pad_token_id": _padding(theirs),
        "bos_token_id": theirs.bos_token_id,
        "eos_token_id": theirs.eos_token_id,
    }


def _llama_like(theirs: PreTrainedConfig) -> Options:
    return {
        **_shared(theirs),
        "intermediate_size": theirs.intermediate_size,
        "num_key_value_heads": theirs.num_key_value_heads,
        "head_dim": getattr(theirs, "head_dim", None),
        "norm_eps": theirs.rms_norm_eps,
        "rope_parameters": dict(theirs.rope_parameters),
        "activation": choose("hidden_act", theirs.hidden_act, ACTIVATIONS),
        "attention_dropout": theirs.attention_dropout or 0.0,  # some files say null
    }


def _llama(theirs: PreTrainedConfig) -> Options:
    biased = theirs.attention_bias
    biases = {"attention_bias": biased, "attention_output_bias": biased, "mlp_bias": theirs.mlp_bias}
    return {**_llama_like(theirs), **biases}


def _qwen2(theirs: PreTrainedConfig) -> Options:
    return {**_llama_like(theirs), "attention_bias": True}


def _qwen3(theirs: PreTrainedConfig) -> Options:
    biased = theirs.attention_bias
    return {**_llama_like(theirs), "qk_norm": True, "attention_bias": biased, "attention_output_bias": biased}


def _gpt2(theirs: PreTrainedConfig) -> Options:
    return {
        **_shared(theirs),
        "intermediate_size": theirs.n_inner or 4 * theirs.hidden_size,
        "norm": "layernorm",
        "norm_eps": theirs.layer_norm_epsilon,
        "positions": "learned",
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


GPT2_NAMES = {
    "transformer.wte.": "model.embed_tokens.",
    "transformer.wpe.": "model.positions.",
    "transformer.ln_f.": "model.norm.",
    "transformer.h.": "model.layers.",
    ".ln_1.": ".input_layernorm.",
    ".ln_2.": ".post_attention_layernorm.",
    ".attn.c_proj.": ".self_attn.o_proj.",
    ".mlp.c_fc.": ".mlp.up_proj.",
    ".mlp.c_proj.": ".mlp.down_proj.",
}
GPT2_PROJECTIONS = (".c_attn.", ".c_proj.", ".c_fc.")  # Conv1D: weights [in, out], the transpose of nn.Linear's


def _gpt2_tensors(theirs: Mapping[str, Tensor]) -> Tensors:
    """Names, transposes, and the fused queries, keys and values taken apart."""
    ours: Tensors = {}
    for theirs_name, value in theirs.items():
        if any(part in theirs_name for part in GPT2_PROJECTIONS) and theirs_name.endswith(".weight"):
            value = value.t()
        name = theirs_name
        for old, new in GPT2_NAMES.items():
            name = name.replace(old, new)
        if ".attn.c_attn." in name:
            for letter, part in zip("qkv", value.chunk(3, dim=0), strict=True):
                ours[name.replace(".attn.c_attn.", f".self_attn.{letter}_proj.")] = part.contiguous()
        else:
            ours[name] = value.contiguous()
    return ours


FAMILIES: dict[str, Family] = {
    "llama": Family(options=_llama),
    "mistral": Family(options=_llama_like),
    "qwen2": Family(options=_qwen2),
    "qwen3": Family(options=_qwen3),
    "gpt2": Family(options=_gpt2, tensors=_gpt2_tensors),
}


def family_of(values: PlainMapping) -> Family:
    """The family of a configuration, as read from config.json. Raises ValueError naming those that are supported."""
    kind, supported = values.get("model_type"), f"supported: {', '.join(FAMILIES)}"
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind is None:
        raise ValueError(f"config.json names no model_type; {supported}")
    experts = any(values.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    what = "a mixture of experts; only dense models load" if experts else "not one of the architectures that load"
    raise ValueError(f"architecture {kind!r} is {what} ({supported})")


def config_of(theirs: PreTrainedConfig) -> SkipstoneConfig:
    """Our configuration of the same model. Raises ValueError naming what this decoder does not compute."""
    family = family_of({"model_type": theirs.model_type})
    for reason in _refusals(theirs):
        raise ValueError(reason)
    return SkipstoneConfig.from_plain(family.options(theirs))


def _refusals(theirs: PreTrainedConfig) -> Iterator[str]:
    """Reasons why the model would compute something else here; dynamic RoPE is refused by our own configuration."""
    for name, supported in ONLY.items():
        if getattr(theirs, name, supported) != supported:
            yield f"{name}={getattr(theirs, name)} is not supported (only {supported})"
    window, types = getattr(theirs, "sliding_window", None), set(getattr(theirs, "layer_types", None) or [])
    if other := sorted(types - {"full_attention", "sliding_attention"}):
        yield f"layer_types has {other[0]!r}; only full attention is supported"
    slides = window is not None and (not types or "sliding_attention" in types)
    if slides and window < theirs.max_position_embeddings:
        yield (
            f"sliding_window={window} is active within the context of {theirs.max_position_embeddings} tokens; "
            "only full attention is supported"
        )
    rope = getattr(theirs, "rope_parameters", None) or {}
    if any(isinstance(value, dict) for value in rope.values()):
        yield "rope_parameters differ by layer type; one RoPE for all layers is supported"
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        yield f"partial_rotary_factor={rope['partial_rotary_factor']} is not supported; RoPE turns the whole head"
    if getattr(theirs, "quantization_config", None) is not None:
        yield "the weights are quantised (quantization_config); load the unquantised checkpoint"
