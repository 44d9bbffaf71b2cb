"""Storing the weights of a model in 16, 8 or 4 bits, and the reverse.

This concerns all matrices of attention, MLP, head and token embedding. With 16 bits they are bf16 or fp16, with 8
rounded to int8 in groups of 64 inputs, and with 4 those of attention and MLP to four bits in groups of 32. Norms,
biases, learned positions and the parameters of mechanisms keep their precision.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional

from skipstone.core.weights import is_quantised
from skipstone.model.build import BY_NEURON, Int4Linear, Int8Weights, MagnitudeMLP, StoredWeights, layers_of, plain_mlps
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig
from skipstone.model.gguf_blocks import FourBitRows
from skipstone.model.loading import from_tensors
from skipstone.ops import float16, int4, int8

FLOAT, INT8, INT4 = "float", "int8", "int4"
BITS = (16, 8, 4)
MOST_ADDED = 8  # one neuron of zeros for so many others
DECODER = "model."  # what the names of a decoder's parts begin with


def quantise(model: SkipstoneForCausalLM, bits: int = 8, given: FourBitRows | None = None) -> SkipstoneForCausalLM:
    """Return a copy of the model with weights in few bits in all matrices of attention, MLP, head and token embedding.

    bits: 8 for int8; 4 for four bits in attention and MLP, and int8 elsewhere; 16 for bf16 if it holds all weights
    exactly, else whichever of fp16 and bf16 loses less. Each 64 inputs of an int8 row share a scale, or all of them if
    their number is not a multiple of 64. Groups have 32 inputs instead if most weights come from blocks such as Q8_0 or
    Q5_0 of a GGUF file, whose values they keep. Each 32 inputs of a four-bit row share a scale and an offset. With 4
    bits, three kinds of matrices in the blocks become int8: those whose number of inputs is not a multiple of 64, those
    whose weights fp16 scales cannot hold, and up and down of an MLP that leaves out neurons by magnitude. With 16 bits,
    these up and down matrices keep their dtype. With 8 and 4 bits, an MLP of one activation function gets zero-valued
    neurons up to a multiple of 64, if these are few (`with_whole_groups`). given: the rows of the GGUF file that an
    fp32 model was loaded from: with 4 bits, the file's four-bit blocks are taken over as they are, and if it has any,
    all other matrices become int8. None means that all weights are rounded here. Raises ValueError for anything but a
    SkipstoneForCausalLM, for a model that is quantised already (by this function or by torchao), for one with adapters
    of PEFT, for a mixture of experts, and for weights that are not finite.
    """
    check_model(model)
    if type(bits) is not int or bits not in BITS:
        raise ValueError(f"bits must be 16, 8 or 4, got {bits!r}")
    if model.config.weight_format != FLOAT:
        raise ValueError(f"the model has {model.config.weight_format} weights already")
    if any(is_quantised(module) for module in model.modules() if isinstance(module, torch.nn.Linear)):
        raise ValueError("the model's weights are quantised already, by torchao; quantise the original")
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("the model has weights without values (on the device meta, or offloaded); load it in memory")
    if any(hasattr(module, "base_layer") for module in model.modules()):
        raise ValueError("the model has adapters; merge them into its weights (merge_and_unload), then quantise")
    tensors: dict[str, Tensor] = dict(model.state_dict())
    if bits == 16:
        return _in_16_bits(model, tensors)
    if given is None or not given.any:
        model = with_whole_groups(model)
        tensors = dict(model.state_dict())
    four, left = _four_bits(model, tensors, given) if bits == 4 else ({}, None)
    config = _with_format(model, INT4 if bits == 4 else INT8, int8.GROUP, left)
    rounded = [name for name, layer in _layers(config).items() if isinstance(layer, Int8Weights)]
    config.weight_group = _group([tensors[f"{name}.weight"] for name in rounded if f"{name}.weight" in tensors])
    for name, layer in _layers(config).items():
        if isinstance(layer, Int4Linear):
            tensors[f"{name}.weight"] = four[name]
        elif isinstance(layer, Int8Weights) and f"{name}.weight" in tensors:
            number, scale = int8.quantise(tensors[f"{name}.weight"], layer.group)
            tensors |= {f"{name}.weight": number, f"{name}.weight_scale": scale}
    return rebuilt(model, config, tensors)


def with_whole_groups(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM:
    """Return the model with zero-valued neurons added to every MLP, so that their number is a multiple of 64.

    Compiled decoding steps read int8 and four-bit weights in groups of 64 inputs, so they cannot serve an MLP of, say,
    864 neurons. The new neurons contribute exactly 0. The model itself is returned if nothing is missing, if more than
    an eighth would be added, and if an MLP has parameters per neuron besides its matrices, as PolyGLU and neuron groups
    have, or is a mixture of experts.
    """
    more, names = -model.config.neurons % int8.GROUP, plain_mlps(model)
    if not 0 < more * MOST_ADDED <= model.config.neurons or len(names) < model.config.num_hidden_layers:
        return model
    tensors = dict(model.state_dict())
    for name in names:
        for matrix, side in (("gate_proj", (0, 0, 0, more)), ("up_proj", (0, 0, 0, more)), ("down_proj", (0, more))):
            if (weight := tensors.get(key := f"{name}.{matrix}.weight")) is not None:
                tensors[key] = functional.pad(weight, side)
            if matrix != "down_proj" and (bias := tensors.get(key := f"{name}.{matrix}.bias")) is not None:
                tensors[key] = functional.pad(bias, (0, more))
    wider = {"intermediate_size": model.config.neurons + more}
    return rebuilt(model, SkipstoneConfig(**{**model.config.to_dict(), **wider}), tensors)


def check_model(model: object) -> None:
    """Raise ValueError unless `model` is a SkipstoneForCausalLM.

    A model of transformers with mechanisms added by `skipstone.route` and one wrapped by PEFT are refused.
    """
    if not isinstance(model, SkipstoneForCausalLM):
        raise ValueError(f"model must be a SkipstoneForCausalLM, got {type(model).__name__}")


def _group(weights: list[Tensor]) -> int:
    """Return how many inputs share a scale in int8: 32 if that keeps the values of most of the weights, else 64."""
    kept = sum(weight.numel() for weight in weights if int8.on_a_grid(weight))
    return int8.FINE if 2 * kept > sum(weight.numel() for weight in weights) else int8.GROUP


def stored_exactly(model: SkipstoneForCausalLM, small: SkipstoneForCausalLM) -> bool:
    """Return whether all weights of `small`, which `quantise` made of `model`, have the values of the original."""
    given = model.state_dict()
    for name, layer in layers_of(small).items():
        weight, whole = given[f"{name}.weight"], layer.restored()
        if not torch.equal(whole[tuple(map(slice, weight.shape))], weight):  # behind it lie only added neurons
            return False
    return True


def _in_16_bits(model: SkipstoneForCausalLM, tensors: dict[str, Tensor]) -> SkipstoneForCausalLM:
    names = [f"{name}.weight" for name in _layers(_with_format(model, "bfloat16", None, None))]
    names = [name for name in names if name in tensors]
    stored = float16.format_of([tensors[name] for name in names])
    for name in names:
        tensors[name] = tensors[name].to(stored).view(torch.int16)
    return rebuilt(model, _with_format(model, str(stored).removeprefix("torch."), None, None), tensors)


def _four_bits(
    model: SkipstoneForCausalLM, tensors: dict[str, Tensor], given: FourBitRows | None
) -> tuple[dict[str, Tensor], list[str]]:
    """Return four-bit matrices by name, and the paths below the decoder of those that stay int8."""
    found, left = {}, _read_by_neuron(model)
    for name, layer in _layers(_with_format(model, INT4, int8.GROUP, left)).items():
        if not isinstance(layer, Int4Linear):
            continue
        weight = tensors[f"{name}.weight"]
        if given is not None and given.any:
            rows = given.find(weight)
        elif not bool(weight.isfinite().all()) or int4.fits(weight):
            rows = int4.quantise(weight)  # which refuses what is not finite
        else:
            rows = None
        if rows is None:
            left.append(name.removeprefix(DECODER))
        else:
            found[name] = rows
    return found, left


def _read_by_neuron(model: SkipstoneForCausalLM) -> list[str]:
    named = model.decoder.named_modules()
    return [f"{name}.{matrix}" for name, module in named if isinstance(module, MagnitudeMLP) for matrix in BY_NEURON]


def dequantise(model: SkipstoneForCausalLM) -> SkipstoneForCausalLM:
    """Return a copy of a quantised model that holds the same values in the dtype of its activations.

    Raises ValueError for anything but a SkipstoneForCausalLM.
    """
    check_model(model)
    config = _with_format(model, FLOAT, None, None)
    tensors = dict(model.state_dict())
    for name, layer in layers_of(model).items():
        tensors[f"{name}.weight"] = layer.restored()
        tensors.pop(f"{name}.weight_scale", None)
    return rebuilt(model, config, tensors)


def check_quantised(model: SkipstoneForCausalLM) -> None:
    """Raise ValueError, which names the tensor, if a stored scale, offset or 16-bit weight is not finite."""
    for name, layer in layers_of(model).items():
        if not bool(layer.stored_floats().isfinite().all()):
            raise ValueError(f"{name}.weight has {layer.NUMBERS} that is not finite")


def _with_format(
    model: SkipstoneForCausalLM, weight_format: str, group: int | None, left: list[str] | None
) -> SkipstoneConfig:
    changed = {"weight_format": weight_format, "weight_group": group, "weight_int8": left or None}
    return SkipstoneConfig(**{**model.config.to_dict(), **changed})


def _layers(config: SkipstoneConfig) -> dict[str, StoredWeights]:
    """Return the quantised layers by name, without their weights. Layers that share a weight are included."""
    with torch.device("meta"):
        model: nn.Module = SkipstoneForCausalLM(config)
    return layers_of(model)


def rebuilt(model: SkipstoneForCausalLM, config: SkipstoneConfig, tensors: dict[str, Tensor]) -> SkipstoneForCausalLM:
    """Return a model with the configuration `config` and the weights `tensors`.

    Its dtype, training mode and generation config are those of `model`. tensors: the state dict of the new model;
    entries of the head are dropped if `config` ties it to the embedding, and tensors that belong to `model` are copied,
    so that a change of one model never reaches the other.
    """
    own = {tensor.untyped_storage().data_ptr() for tensor in model.state_dict().values()}
    tensors = {n: x.clone() if x.untyped_storage().data_ptr() in own else x for n, x in tensors.items()}
    if config.tie_word_embeddings:
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("lm_head.")}
    built = from_tensors(config, tensors, model.dtype).train(model.training)
    built.generation_config = copy.deepcopy(model.generation_config)
    return built
