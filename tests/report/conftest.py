"""Tiny trained runs: a dense one, and one with every kind of mechanism."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from skipstone.train.training import train

MECHANISMS: list[dict[str, Any]] = [
    {"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "positional"},
    {"name": "token_selective", "layers": [2], "start_bias": -2.0},
]
TEXT = "to be, or not to be: that is <the> question & more\n" * 40


def recipe(corpus: str, **model: Any) -> dict[str, Any]:
    return {
        "model": {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2, **model},
        "data": {"corpus": corpus, "context": 32, "tokenizer": "char", "validation_rows": 4},
        "train": {"steps": 3, "batch_size": 2, "warmup_steps": 1, "eval_every": 2, "log_every": 1, "save_every": 0},
    }


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("runs")
    text = root / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    corpus = f"text:{text}"
    routed = recipe(corpus, mechanisms=MECHANISMS, activation={"name": "polyglu"})
    return {
        "dense": train(recipe(corpus), out=root / "dense", progress=False),
        "routed": train(routed, out=root / "routed", progress=False),
    }
