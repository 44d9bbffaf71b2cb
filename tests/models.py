"""Tiny models with random weights, which a test's options make what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from skipstone import SkipstoneConfig, SkipstoneForCausalLM

SIZES: dict[str, Any] = {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def tiny_model(seed: int | None = 0, **options: Any) -> SkipstoneForCausalLM:
    """Return a model in evaluation mode, of two blocks of width 32 with two heads and 61 tokens unless options differ.

    seed: that of the weights; None means that they are drawn from where torch's random numbers are. options: of the
    configuration, `SIZES` included.
    """
    if seed is not None:
        torch.manual_seed(seed)
    return SkipstoneForCausalLM(SkipstoneConfig(**{**SIZES, **options})).eval()


def on_disk(model: SkipstoneForCausalLM, folder: Path) -> PreTrainedModel:
    """Save a model below `folder` and load it so that accelerate reads its weights from disk as they are needed."""
    model.save_pretrained(folder / "model")
    places = {"device_map": {"": "disk"}, "offload_folder": folder / "offload"}
    return AutoModelForCausalLM.from_pretrained(folder / "model", **places).eval()
