"""Back to a checkpoint of transformers' own classes, which needs nothing of ours to load.

Mechanisms that only decide who is computed are left out, and said to be; what they had changed in the weights stays.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from skipstone.core.atomic_write import complete
from skipstone.core.strict import PlainDict
from skipstone.mechanisms import PolyGLU
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families import GPT2_NAMES, GPT2_PROJECTIONS
from skipstone.model.loading import quiet
from skipstone.model.pretrained import load_model, load_tokenizer
from skipstone.nn.mlp import FixedMix
from skipstone.ops import reference as ops
from skipstone.runs import Run

PURE = 0.999  # a neuron's mix is a single activation if that one's share is at least this, for every context
HF_ACTIVATIONS = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "tanh": "tanh"}


def export_dense(model: str | Path, out: Path, dtype: str | None = None) -> None:
    """Write a saved model or run of ours to `out` as a dense Llama, Qwen2, Qwen3 or GPT-2 checkpoint.

    Warns, one line for each mechanism that is left out, what is lost. Raises ValueError for a PolyGLU whose neurons mix
    activations, for a decoder that none of these families computes, and FileExistsError if `out` holds something.
    """
    folder = Run(Path(model)).model_folder()
    ours = load_model(folder, dtype).eval()
    activation = dense_activation(ours)
    # A merge or a new head may have untied them since the configuration was written.
    ours.config.tie_word_embeddings = ours.head_is_tied
    config = family_config(ours.config, activation)
    with complete(Path(out)) as partial:
        for line in losses(ours):
            warnings.warn(line, stacklevel=2)
        with torch.device("meta"):
            theirs = AutoModelForCausalLM.from_config(config)
        theirs.to(ours.dtype)
        theirs.load_state_dict(tensors_of(ours, config.model_type), assign=True)
        theirs.tie_weights()
        theirs.generation_config = ours.generation_config
        with quiet():
            theirs.save_pretrained(partial)
        tokenizer = load_tokenizer(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(partial)


def losses(model: SkipstoneForCausalLM) -> list[str]:
    """Say what is lost by leaving each kind of depth mechanism out, and neuron groups that are chosen by magnitude."""
    layers: dict[str, list[int]] = {}
    for i, block in enumerate(model.model.layers):
        for name in block.mechanisms:  # type: ignore[union-attr]
            layers.setdefault(name, []).append(i)
    lost = [
        f"{name} is left out of blocks {', '.join(map(str, blocks))}: every token passes them with weight 1, which is "
        "not what the model was trained to, and nothing is saved"
        for name, blocks in layers.items()
    ]
    if model.config.neuron_groups is not None:
        lost.append("neuron_groups are left out: all neurons are on for every token, and nothing is saved")
    return lost


def dense_activation(model: SkipstoneForCausalLM) -> str:
    """Return the name of the function of every neuron. Raises ValueError where neurons mix several, or differ."""
    if isinstance(model.config.activation, str):
        return str(model.config.activation)
    found: set[str] = set()
    for block in model.model.layers:
        activation: Any = block.mlp.activation  # type: ignore[union-attr]
        found |= set(activation.groups) if isinstance(activation, FixedMix) else _pure(activation)
    if len(found) != 1 or "" in found:
        what = "mix activations" if "" in found else f"use {', '.join(sorted(found))}"
        name = model.config.activation_options["name"]
        raise ValueError(f"activation {name} cannot be removed: its neurons {what}; dense families have one function")
    return found.pop()


@torch.no_grad()
def _pure(activation: PolyGLU) -> set[str]:
    """Names of the functions that single neurons use, "" among them if some neuron mixes.

    The context's part is bounded by its weights only where these are 0; otherwise any mix may occur.
    """
    if activation.mix_weight.abs().max() > 0:
        return {""}
    logits_FA = activation.preference_FA + activation.scale.float() * activation.mix_bias.float()
    share_F, best_F = (logits_FA / activation.tau).softmax(-1).max(-1)
    if share_F.min() < PURE:
        return {""}
    names = [function.__name__ for function in ops.ACTIVATIONS]
    return {names[i] for i in best_F.unique().tolist()}


def family_config(config: SkipstoneConfig, activation: str) -> PreTrainedConfig:
    """Return the configuration of the same dense model in a family of transformers. Raises ValueError if there is
    none.
    """
    if config.neuron_groups is not None and config.neuron_groups.get("decision") != "magnitude":
        raise ValueError("no dense family has neuron_groups: what they compute is scaled anew in every chunk")
    for kind, (fits, options) in TARGETS.items():
        if fits(config):
            return AutoConfig.for_model(kind, **_shared(config), **options(config, HF_ACTIVATIONS[activation]))
    parts = {name: getattr(config, name) for name in ("norm", "positions", "mlp", "qk_norm", "attention_bias")}
    raise ValueError(f"no dense family computes this decoder ({', '.join(TARGETS)}): {json.dumps(parts)}")


def _shared(config: SkipstoneConfig) -> PlainDict:
    names = (
        "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings",
        "initializer_range", "tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id",
    )  # fmt: skip
    return {name: getattr(config, name) for name in names}


def _llama(config: SkipstoneConfig, activation: str) -> PlainDict:
    return {
        "intermediate_size": config.intermediate_size,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": dict(config.rope_parameters or {"rope_type": "default", "rope_theta": 10000.0}),
        "hidden_act": activation,
        "attention_dropout": config.attention_dropout,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
    }


def _gpt2(config: SkipstoneConfig, activation: str) -> PlainDict:
    return {
        "n_inner": config.intermediate_size,
        "layer_norm_epsilon": config.norm_eps,
        "activation_function": activation,
        "embd_pdrop": config.embedding_dropout,
        "attn_pdrop": config.attention_dropout,
        "resid_pdrop": config.residual_dropout,
    }


def _is_llama_like(config: SkipstoneConfig) -> bool:
    return (config.norm, config.positions, config.mlp) == ("rmsnorm", "rope", "gated")


def _fits_llama(config: SkipstoneConfig) -> bool:
    return _is_llama_like(config) and not config.qk_norm and config.attention_bias == config.attention_output_bias


def _fits_qwen2(config: SkipstoneConfig) -> bool:
    plain = not (config.qk_norm or config.attention_output_bias or config.mlp_bias)
    return _is_llama_like(config) and plain and config.attention_bias


def _fits_qwen3(config: SkipstoneConfig) -> bool:
    same = config.attention_bias == config.attention_output_bias
    return _is_llama_like(config) and config.qk_norm and same and not config.mlp_bias


def _fits_gpt2(config: SkipstoneConfig) -> bool:
    biases = config.mlp_bias and config.attention_bias and config.attention_output_bias
    kinds = (config.norm, config.positions, config.mlp) == ("layernorm", "learned", "plain")
    return kinds and biases and not config.qk_norm and config.num_key_value_heads == config.num_attention_heads


Target = tuple[Callable[[SkipstoneConfig], bool], Callable[[SkipstoneConfig, str], PlainDict]]
TARGETS: dict[str, Target] = {
    "llama": (_fits_llama, _llama),
    "qwen2": (_fits_qwen2, _llama),
    "qwen3": (_fits_qwen3, _llama),
    "gpt2": (_fits_gpt2, _gpt2),
}


def tensors_of(model: SkipstoneForCausalLM, kind: str) -> dict[str, Tensor]:
    """Return the weights under the family's names, without those of mechanisms."""
    own = (".mechanisms.", ".mlp.activation.", ".mlp.router.")
    ours = {name: x for name, x in model.state_dict().items() if not any(part in name for part in own)}
    return _gpt2_tensors(ours) if kind == "gpt2" else ours


def _gpt2_tensors(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The way back of `families`: names, transposes, queries, keys and values in one projection."""
    theirs: dict[str, Tensor] = {}
    fused: dict[str, list[Tensor]] = {}
    for name, value in ours.items():
        for old, new in GPT2_NAMES.items():
            name = name.replace(new, old)
        for letter in "qkv":
            if f".self_attn.{letter}_proj." in name:
                fused.setdefault(name.replace(f".self_attn.{letter}_proj.", ".attn.c_attn."), []).append(value)
                break
        else:
            theirs[name] = value
    theirs |= {name: torch.cat(parts) for name, parts in fused.items()}
    projected = {n for n in theirs if any(part in n for part in GPT2_PROJECTIONS) and n.endswith(".weight")}
    return {name: (value.t() if name in projected else value).contiguous() for name, value in theirs.items()}
