"""Replacement of the linear layers and the token embedding of a model by layers of a compact weight format."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import nn

from skipstone.core.routing_module import RoutingModule
from skipstone.nn.embedding import ScaledEmbedding
from skipstone.nn.float16 import FORMATS, Float16Embedding, Float16Linear
from skipstone.nn.int4 import Int4Linear
from skipstone.nn.int8 import Int8Embedding, Int8Linear
from skipstone.nn.magnitude_mlp import MagnitudeMLP
from skipstone.nn.stored_weights import StoredLinear, StoredWeights
from skipstone.ops import int4

BY_NEURON = ("up_proj", "down_proj")  # matrices of a `MagnitudeMLP` of which some neurons are read: fp32 or int8


@dataclass(frozen=True, kw_only=True)
class Format:
    """How the weights of a model are stored.

    name: "int8", "int4", "bfloat16" or "float16". group: number of inputs that share a scale of an int8 weight; None
    means one scale per output. left: with int4, the paths below the decoder of matrices that are int8 nevertheless. So
    are the token embedding, the head, and layers whose number of inputs is not a multiple of 64. With the 16-bit
    formats, the up and down projection of a `MagnitudeMLP`, which reads them for some neurons only, stay nn.Linear.
    """

    name: str
    group: int | None = None
    left: Collection[str] = ()

    def linear(self, inputs: int, outputs: int, bias: bool, path: str | None = None) -> StoredLinear:
        """Build a linear layer of this format with placeholder weights, to be filled in by loading.

        inputs, outputs: its numbers of inputs and outputs. bias: whether it has a bias. path: its path below the
        decoder, which `left` may name; None for the head.
        """
        if self.name in FORMATS:
            return Float16Linear(inputs, outputs, bias, FORMATS[self.name])
        if self.name == "int4" and path is not None and int4.serves(inputs) and path not in self.left:
            return Int4Linear(inputs, outputs, bias)
        return Int8Linear(inputs, outputs, bias, self.group)

    def embedding(self, given: nn.Embedding) -> StoredWeights:
        """Build a token embedding of this format with placeholder weights, to be filled in by loading.

        given: the embedding whose sizes, padding id and constant factor (if it has one) it takes over.
        """
        factor = given.scale if isinstance(given, ScaledEmbedding) else 1.0
        places = given.num_embeddings, given.embedding_dim, given.padding_idx, factor
        if self.name in FORMATS:
            return Float16Embedding(*places, FORMATS[self.name])
        return Int8Embedding(*places, self.group)

    def replace(self, module: nn.Module) -> None:
        """Replace all linear layers below a decoder, and its token embedding, by layers of this format, in place.

        module: the decoder. Layers of mechanisms are left alone. The new layers have placeholder weights, to be filled
        in by loading a state dict. Raises ValueError if `left` names anything but a matrix of the blocks.
        """
        self._replace(module, "")
        named = dict(module.named_modules())
        for name in self.left:
            if not isinstance(named.get(name), Int8Linear):
                raise ValueError(f"weight_int8 names {name!r}, which is no matrix of the model's blocks")

    def _replace(self, module: nn.Module, path: str) -> None:
        whole = BY_NEURON if isinstance(module, MagnitudeMLP) and self.name in FORMATS else ()
        for name, child in module.named_children():
            if isinstance(child, RoutingModule) or name in whole:
                continue
            if isinstance(child, nn.Linear):
                sizes = child.in_features, child.out_features, child.bias is not None
                setattr(module, name, self.linear(*sizes, path + name))
            elif isinstance(child, nn.Embedding) and name == "embed_tokens":
                setattr(module, name, self.embedding(child))
            else:
                self._replace(child, f"{path}{name}.")


def layers_of(module: nn.Module) -> dict[str, StoredWeights]:
    """Return the layers below a module whose weights are stored in a compact format, such as int8 or int4, by name."""
    return {name: layer for name, layer in module.named_modules() if isinstance(layer, StoredWeights)}


def is_stored(x: torch.Tensor) -> bool:
    """Return whether a tensor is the weight of a layer in a compact format: a parameter of dtype int8, uint8 or int16.

    x: any parameter or buffer of a model.
    """
    return type(x) is nn.Parameter and x.dtype in (torch.int8, torch.uint8, torch.int16)
