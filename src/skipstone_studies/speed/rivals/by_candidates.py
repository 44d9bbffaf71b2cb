"""One way to decode: our model with a head that computes exact logits of a few candidate tokens only.

`theirs` loads the same checkpoint, whatever its family, as transformers' model: the reference for this and other ways.
"""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from skipstone.adapt.export import export_dense
from skipstone.measure.bytes_read import head_bytes
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.head_preview import with_head_candidates
from skipstone.model.loading import quiet
from skipstone.model.quantise import quantise
from skipstone_studies.speed.rivals.engines import llama
from skipstone_studies.speed.rivals.source import Logits, calibration, source

ROWS = 32  # of the calibration text, which directions come from


@torch.no_grad()
def by_candidates(name: str, weights: str, candidates: int, directions: int) -> SkipstoneForCausalLM:
    """Return a copy of the source model whose output head computes exact logits of the most promising tokens only.

    Decoding steps give other tokens the logits of a preview. name: the name of the source model (the checkpoint that is
    decoded). weights: "int8", or "float" to leave them in fp32. candidates: number of tokens with exact logits.
    directions: number of directions of the hidden state, fitted on the calibration text, from which a preview of all
    logits is computed to choose these tokens.
    """
    model = quantise(source(name)) if weights == "int8" else source(name)
    return with_head_candidates(model, calibration(name, ROWS), candidates, directions).eval()


def logits_of_steps(model: SkipstoneForCausalLM) -> Logits:
    """Return a function that computes, for a whole text in one pass, the logits that decoding it step by step gives.

    model: has an output head that computes exact logits for a few candidate tokens only (`model.head_preview`).
    Decoding steps use this head, but an ordinary pass over a text computes all logits exactly. The returned function
    takes T token ids, int64 [1, T], and returns the logits after each of them, [T, V] for V tokens of the vocabulary.
    """
    preview = model.head_preview
    assert preview is not None

    def logits(ids_1T: Tensor) -> Tensor:
        hidden = model.model(ids_1T, use_cache=False).last_hidden_state
        return preview.plain(model.to_head(hidden[0]), model.lm_head)

    return logits


def bytes_read(model: SkipstoneForCausalLM) -> float:
    """Return the bytes of weights that a decoding step of a model with head candidates reads.

    model: has an output head that computes exact logits for a few candidates only. The embedding table counts only as
    far as the output head reads it.
    """
    tables = {id(p) for part in (model.lm_head, model.model.embed_tokens) for p in part.parameters()}
    return head_bytes(model) + sum(p.numel() * p.element_size() for p in model.parameters() if id(p) not in tables)


@cache
def theirs(name: str) -> nn.Module:
    """Return transformers' model of the source's architecture with the weights of the source model `name`, in fp32.

    The source model is the checkpoint whose decoding is studied. The model is loaded only once per process, so callers
    must not change it.
    """
    if source(name).config.family in (None, "llama"):
        return llama(name)
    with tempfile.TemporaryDirectory() as folder, quiet():
        source(name).save_pretrained(Path(folder, "ours"))
        export_dense(Path(folder, "ours"), Path(folder, "theirs"))
        model: nn.Module = AutoModelForCausalLM.from_pretrained(Path(folder, "theirs"), dtype=torch.float32).eval()
    return model
