"""Small run folders, written without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml

from skipstone import SkipstoneConfig, SkipstoneForCausalLM
from skipstone.core.strict import from_dict
from skipstone.data.config import DataConfig
from skipstone.data.prepare import prepare

MOD: dict[str, Any] = {"name": "mixture_of_depths", "layers": "1::2", "capacity": 0.25, "decision": "threshold"}
TSA: dict[str, Any] = {"name": "token_selective", "start_bias": 0.0}
TEXT = "Ein Stück Text, für kleine Läufe: 3 € und 🙂. "


def text_data(folder: Path, **options: Any) -> dict[str, Any]:
    """Return a recipe's section `data`: a corpus of bytes, written to `folder` and cut into rows of 24."""
    folder.mkdir(parents=True, exist_ok=True)
    for split, times in (("train", 8), ("validation", 5), ("test", 3)):
        (folder / f"{split}.txt").write_text(TEXT * times, encoding="utf-8")
    return {"corpus": f"text:{folder}", "tokenizer": "byte", "context": 24, **options}


def reset_data(rows: int = 12, context: int = 32) -> dict[str, Any]:
    return {"corpus": "reset-s3", "context": context, "validation_rows": rows}


def write_run(
    folder: Path,
    data: dict[str, Any],
    mechanisms: list[dict[str, Any]],
    activation: str = "silu",
    train: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a run folder as training leaves it, with an untrained model whose predictions are far from uniform."""
    prepared = prepare(from_dict(DataConfig, data), train=False)
    torch.manual_seed(2)
    config = SkipstoneConfig(
        vocab_size=prepared.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=data["context"],
        initializer_range=0.3,
        activation=activation,
        mechanisms=mechanisms,
        **options,
    )
    SkipstoneForCausalLM(config).save_pretrained(folder / "model")
    if prepared.tokenizer is not None:
        prepared.tokenizer.save_pretrained(folder / "tokenizer")
        prepared.tokenizer.save_pretrained(folder / "model")
    recipe = {"model": config.to_dict(), "data": data, "train": train or {}}
    (folder / "config.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    result = {"tokens_per_second": 1234.5, "validation": {"oracle_loss": 2.5, "causal_loss": 2.25}}
    (folder / "result.json").write_text(json.dumps(result), encoding="utf-8")
    return folder
