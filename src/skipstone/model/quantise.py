"""Quantisation of a model to int8 weights, and the reverse.

All matrices of attention, MLP, head and token embedding are rounded in groups of 64 inputs. Norms, biases, learned
positions and the parameters of mechanisms keep their precision.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from skipstone.core.weights import is_quantised
from skipstone.model.build import Int8Embedding, Int8Linear
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.loading import from_tensors
from skipstone.ops import int8

FLOAT, INT8 = "float", "int8"


def quantise(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM:
    """Return a copy of the model with int8 weights in all matrices of attention, MLP, head and token embedding.

    Each 64 inputs of a matrix row share a scale, or all of them if their number is not a multiple of 64. Raises
    ValueError for a model that is quantised already (by this function or by torchao), for a mixture of experts, and for
    weights that are not finite.
    """
    if model.config.weight_format == INT8:
        raise ValueError("the model has int8 weights already")
    if any(is_quantised(module) for module in model.modules() if isinstance(module, torch.nn.Linear)):
        raise ValueError("the model's weights are quantised already, by torchao; quantise the original")
    config = _with_format(model, INT8, int8.GROUP)
    tensors: dict[str, Tensor] = dict(model.state_dict())
    for name, group in _groups(config).items():
        if f"{name}.weight" in tensors:
            number, scale = int8.quantise(tensors[f"{name}.weight"], group)
            tensors |= {f"{name}.weight": number, f"{name}.weight_scale": scale}
    return rebuilt(model, config, tensors)


def dequantise(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM:
    """Return a copy of a model with int8 weights that holds the same values in the dtype of its activations."""
    config = _with_format(model, FLOAT, None)
    tensors = dict(model.state_dict())
    for name in _groups(model.config):
        number, scale = tensors[f"{name}.weight"], tensors.pop(f"{name}.weight_scale")
        tensors[f"{name}.weight"] = int8.restore(number, scale, model.dtype)
    return rebuilt(model, config, tensors)


def _with_format(model: SkipstoneForCausalLM, weight_format: str, group: int | None) -> SkipstoneConfig:
    return SkipstoneConfig(**{**model.config.to_dict(), "weight_format": weight_format, "weight_group": group})


def _groups(config: SkipstoneConfig) -> dict[str, int | None]:
    """Return {name of a layer with int8 weights: number of inputs that share a scale}; None means all of a row.

    Layers that share the weight of another one are included.
    """
    with torch.device("meta"):
        model = SkipstoneForCausalLM(config)
    named = model.named_modules()
    return {name: module.group for name, module in named if isinstance(module, Int8Linear | Int8Embedding)}


def rebuilt(model: SkipstoneForCausalLM, config: SkipstoneConfig, tensors: dict[str, Tensor]) -> SkipstoneForCausalLM:
    """Return a model of another configuration with these weights.

    Its dtype, training mode and generation config are taken from `model`. tensors: the state dict of the new model.
    Entries of the head are dropped if it is tied to the embedding.
    """
    if config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    built = from_tensors(config, tensors, model.dtype).train(model.training)
    built.generation_config = copy.deepcopy(model.generation_config)
    return built
