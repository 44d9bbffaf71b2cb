"""Export to a dense checkpoint that transformers loads without Skipstone, of an architecture such as Llama.

Depth mechanisms are left out with a warning; their effect on the other weights during training stays.
"""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from skipstone.core.atomic_write import complete
from skipstone.core.progress_bar import stages
from skipstone.mechanisms import PolyGLU
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.families import FAMILIES, family_config
from skipstone.model.loading import quiet
from skipstone.model.pretrained import load_model, load_tokenizer
from skipstone.model.quantise import dequantise
from skipstone.nn.mlp import FixedMix
from skipstone.ops import reference as ops
from skipstone.runs import Run

PURE = 0.999  # a neuron's mix is a single activation if that one's share is at least this, for every context


def export_dense(model: str | Path, out: Path, dtype: str | None = None) -> None:
    """Write a saved model or run to the folder `out` as a dense checkpoint that transformers loads without Skipstone.

    The architecture is that of the original checkpoint, or the first known one that computes the same. A warning names
    each mechanism that is left out. model: folder of the run or saved model. dtype: dtype of the weights; None keeps
    the dtype as stored. Raises FileNotFoundError or ValueError for a folder that cannot be read, ValueError for a
    PolyGLU whose neurons mix activations and for a decoder that no dense architecture computes, and FileExistsError if
    `out` is not empty.
    """
    with stages("reading the model", "writing the model") as stage:
        next(stage)
        folder = Run(Path(model)).model_folder()
        ours = load_model(folder, dtype).eval()
        next(stage)
        _export_dense(ours, folder, out)


def _export_dense(ours: SkipstoneForCausalLM, folder: Path, out: Path) -> None:
    if ours.config.weight_format != "float":
        ours = dequantise(ours)
    ours.head_preview = None  # other decoders read their whole head
    ours.config.head_candidates = ours.config.head_directions = None
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
    """Return sentences that say what a dense export of `model` loses, one for each kind of mechanism left out.

    The kinds are those of depth mechanisms, and neuron groups. The list is empty if the export computes the same.
    """
    layers: dict[str, list[int]] = {}
    for i, block in enumerate(model.decoder.layers):
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
    """Return the name of the activation function that all neurons of the model use.

    Raises ValueError if a neuron mixes several functions, or if not all neurons have the same one.
    """
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
    """Return the names of the functions that single neurons use, with "" if some neuron mixes several.

    The part of the logits that depends on the context is bounded only where its weights are 0; otherwise any mix may
    occur.
    """
    if activation.mix_weight.abs().max() > 0:
        return {""}
    logits_FA = activation.preference_FA + activation.scale.float() * activation.mix_bias.float()
    share_F, best_F = (logits_FA / activation.tau).softmax(-1).max(-1)
    if share_F.min() < PURE:
        return {""}
    names = [function.__name__ for function in ops.ACTIVATIONS]
    return {names[i] for i in best_F.unique().tolist()}


def tensors_of(model: SkipstoneForCausalLM, kind: str) -> dict[str, Tensor]:
    """Return the model's weights by the tensor names of another architecture; those of mechanisms are left out.

    Tensors share the model's memory where nothing has to be reordered. kind: the architecture's `model_type` in
    transformers, such as "llama"; a key of `FAMILIES`.
    """
    own = (".mechanisms.", ".mlp.activation.", ".mlp.router.")
    ours = {name: x for name, x in model.state_dict().items() if not any(part in name for part in own)}
    return FAMILIES[kind].layout.theirs(ours, model.config)
