"""The table of the pretrained decoder families that load, and the conversion of configurations in both directions."""

from __future__ import annotations

import json
from collections.abc import Iterator

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from skipstone.core.strict import PlainMapping
from skipstone.model.config import SkipstoneConfig
from skipstone.model.families.base import SHARED, Family, Options, shared_back
from skipstone.model.families.cohere import COHERE, COHERE2
from skipstone.model.families.gemma import GEMMA2, GEMMA3
from skipstone.model.families.glm import GLM, GLM4
from skipstone.model.families.gpt2 import GPT2
from skipstone.model.families.gpt_neox import GPT_NEOX
from skipstone.model.families.llama import GRANITE, LLAMA, MINISTRAL, MISTRAL, QWEN2, QWEN3, SMOLLM3
from skipstone.model.families.nemotron import NEMOTRON
from skipstone.model.families.olmo2 import OLMO2, OLMO3
from skipstone.model.families.phi3 import PHI3
from skipstone.model.families.starcoder2 import STARCODER2
from skipstone.model.fields import TYPES

FAMILIES: dict[str, Family] = {
    "llama": LLAMA,
    "mistral": MISTRAL,
    "ministral": MINISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "smollm3": SMOLLM3,
    "granite": GRANITE,
    "olmo2": OLMO2,
    "olmo3": OLMO3,
    "gemma2": GEMMA2,
    "gemma3_text": GEMMA3,
    "phi3": PHI3,
    "glm": GLM,
    "glm4": GLM4,
    "cohere": COHERE,
    "cohere2": COHERE2,
    "nemotron": NEMOTRON,
    "starcoder2": STARCODER2,
    "gpt_neox": GPT_NEOX,
    "gpt2": GPT2,
}
# Fields that decide what a dense model computes in evaluation.
COMPUTED = TYPES.keys() - {
    "format_version", "family", "mechanisms", "neuron_groups", "activation", "auxiliary_loss_over", "training_routing",
    "initializer_range", "linear_init", "scaled_output_init", "embedding_dropout", "attention_dropout",
    "residual_dropout", "mlp_dropout", "mlp_hidden_dropout", "cache_format", *SHARED,
}  # fmt: skip
# Settings that transformers' code for all decoders reads, with the supported values, the default first.
EVERYWHERE: dict[str, tuple[object, ...]] = {"is_causal": (True,)}
ACTIVATIONS_BACK = {
    "silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu", "relu2": "relu2", "tanh": "tanh",
}  # fmt: skip


def register(model_type: str, family: Family) -> None:
    """Add a family of pretrained decoders, so that its checkpoints can be loaded, converted and written again.

    model_type: the architecture's `model_type` in config.json. family: the rules that translate its configuration and
    tensors. Raises ValueError if it is registered already.
    """
    if model_type in FAMILIES:
        raise ValueError(f"architecture {model_type!r} is registered already")
    FAMILIES[model_type] = family


def family_of(values: PlainMapping) -> Family:
    """Return the family (translation rules) for the `model_type` in the values of a config.json.

    Raises ValueError, which names the supported architectures, if there is no such family.
    """
    kind, supported = values.get("model_type"), f"supported: {', '.join(FAMILIES)}"
    if kind in FAMILIES:
        return FAMILIES[kind]
    if kind is None:
        raise ValueError(f"config.json names no model_type; {supported}")
    experts = any(values.get(key) for key in ("num_experts", "num_local_experts", "n_routed_experts"))
    what = "a mixture of experts; only dense models load" if experts else "not one of the architectures that load"
    raise ValueError(f"architecture {kind!r} is {what} ({supported})")


def config_of(theirs: PreTrainedConfig) -> SkipstoneConfig:
    """Translate `theirs`, a configuration of one of transformers' decoders, to our configuration.

    Raises ValueError that names the architecture or the setting if our decoder would compute something else.
    """
    family = family_of({"model_type": theirs.model_type})
    for reason in _refusals(theirs, family):
        raise ValueError(reason)
    config = SkipstoneConfig.from_plain({**family.read(theirs), "family": theirs.model_type})
    named = getattr(theirs, "head_dim", None)  # classes look for it also where the family's configuration has no field
    if config.positions == "rope" and named not in (None, config.head_size):
        raise ValueError(f"head_dim={named} is not supported (only {config.head_size}, hidden_size by the heads)")
    return config


def _refusals(theirs: PreTrainedConfig, family: Family) -> Iterator[str]:
    """Yield the reasons why our decoder would not compute what the model of transformers does.

    These are unsupported values of its settings. theirs: the model's configuration. family: the rules for its
    architecture.
    """
    for name, supported in {**EVERYWHERE, **family.only}.items():
        if getattr(theirs, name, supported[0]) not in supported:
            yield f"{name}={getattr(theirs, name)} is not supported (only {supported[0]})"
    if getattr(theirs, "quantization_config", None) is not None:
        yield "the weights are quantised (quantization_config); load the unquantised checkpoint"


def family_config(config: SkipstoneConfig, activation: str) -> PreTrainedConfig:
    """Translate our `config` to one of a transformers architecture that computes the same dense model.

    activation: our name of the activation function of all neurons. The architecture that the model was converted from
    is tried first. One is suitable if its configuration translates back to ours. Raises ValueError if none is.
    """
    if config.neuron_groups is not None and config.neuron_groups.get("decision") not in (
        "magnitude",
        "zeros",
    ):
        raise ValueError("no dense family has neuron_groups, whose output is rescaled in every chunk")
    for kind in sorted(FAMILIES, key=lambda kind: kind != config.family):
        theirs = _written(kind, config, activation)
        if theirs is not None:
            return theirs
    default = SkipstoneConfig()
    parts = {
        name: getattr(config, name) for name in sorted(COMPUTED) if getattr(config, name) != getattr(default, name)
    }
    raise ValueError(f"no dense family computes this decoder ({', '.join(FAMILIES)}): {json.dumps(parts)}")


def _written(kind: str, config: SkipstoneConfig, activation: str) -> PreTrainedConfig | None:
    """Return `config` translated to the architecture `kind`, or None if that would not compute the same.

    activation: our name of the activation function of all neurons.
    """
    family = FAMILIES[kind]
    try:
        theirs = AutoConfig.for_model(kind, **shared_back(config), **family.write(config, ACTIVATIONS_BACK[activation]))
        again = config_of(theirs)
    except (ValueError, StrictDataclassError):  # what the family cannot be, its configuration refuses
        return None
    same = all(_comparable(again, name) == _comparable(config, name) for name in COMPUTED)
    return theirs if same and again.activation == activation else None


def _comparable(config: SkipstoneConfig, name: str) -> object:
    value = getattr(config, name)
    if name == "window_layers":
        return config.windowed_layers()
    if name == "rope_layers":
        return config.rotary_layers() if config.positions == "rope" else None
    if name == "qk_norm_over":
        return value if config.qk_norm else None
    if name == "attention_scale":
        return round((config.head_size**-0.5 if value is None else value) * 1e6)
    if name == "logit_scale":
        return round(value * 1e9)
    if name == "window_rope_parameters" and value is None and config.windowed_layers():
        value = config.rope_parameters
    if name in ("rope_parameters", "window_rope_parameters"):
        return _rope(value) if config.positions == "rope" else None
    return value


def _rope(rope: Options | None) -> Options:
    """Return RoPE's parameters with defaults filled in and unset ones removed."""
    rope = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 1.0, **(rope or {})}
    return {name: value for name, value in rope.items() if value is not None and name != "type"}
