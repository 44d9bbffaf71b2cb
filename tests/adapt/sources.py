"""A tiny dense Llama of transformers with a tokenizer, and recipes that adapt it in about a second each."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig

from skipstone.adapt import adaptation
from skipstone.data.tokenizers import char_tokenizer
from skipstone.model.pretrained import load_pretrained
from train.tool import SENTENCE, text_file

VOCAB = 48
SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tokenizer() -> Any:
    return char_tokenizer(set(SENTENCE) | set("0123456789"))


def save_source(folder: Path, config: PreTrainedConfig | None = None, with_tokenizer: bool = True) -> Path:
    """Save a Llama with random weights, so large that leaving out a block changes the output, to `folder`; return it.

    config: another architecture of transformers; None means a tiny Llama.
    """
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZE) if config is None else config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(4) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter) * 0.1)
            assert name
    model.save_pretrained(folder)
    if with_tokenizer:
        tokenizer().save_pretrained(folder)
    return folder


@cache
def _source_model() -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return load_pretrained(save_source(Path(folder), with_tokenizer=False)).eval()


def source_model() -> Any:
    """Return the tiny Llama that `save_source` saves, loaded as a Skipstone model: a copy of its own for each call."""
    model = copy.deepcopy(_source_model())
    torch.manual_seed(3)  # whether it was made just now or before
    return model


def mixture(**options: Any) -> dict[str, Any]:
    return {"name": "mixture_of_depths", "layers": "1:", **options}


def recipe(
    folder: Path, model: Mapping[str, Any], adapt: Mapping[str, Any] | None = None, **train: Any
) -> dict[str, Any]:
    """Return a recipe that adapts a model in 12 steps of 4 rows of 32 characters, on text written to `folder`.

    model, adapt, train: options of these sections.
    """
    short = {"batch_size": 4, "learning_rate": 0.003, "log_every": 3, "eval_every": 6, "eval_rows": 4, "save_every": 5}
    steps = {} if (adapt or {}).get("stages") else {"steps": 12, "warmup_steps": 2}
    data = {"corpus": f"text:{text_file(folder)}", "context": 32}
    settings = {"calibration_rows": 8, **(adapt or {})}
    return {"model": dict(model), "data": data, "train": {**short, **steps, **train}, "adapt": settings}


def run(source: Path, config: Mapping[str, Any], out: Path, resume: bool = False) -> Path:
    """Adapt, but count the executed FLOPs on fewer rows: that takes as long as all the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(adaptation, "COUNTED_ROWS", 4 if (config.get("adapt") or {}).get("budget") is None else 8)
        return adaptation.adapt(str(source), config, out=out, resume=resume, progress=False)
