"""A saved model that skips, mixes activations and has a budget table; small enough to be made for a test."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipstone.budget.budget_table import BudgetTable, OperatingPoint
from skipstone.budget.handles import find_handles
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.model.config import SkipstoneConfig

MECHANISMS = [
    {"name": "mixture_of_depths", "layers": [1], "capacity": 0.5, "decision": "threshold"},
    {"name": "token_selective", "layers": [1, 2], "start_bias": 0.0},
]


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("view") / "small-<model>"
    config = SkipstoneConfig(
        vocab_size=258,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=96,
        mechanisms=MECHANISMS,
        activation={"name": "polyglu"},
    )
    torch.manual_seed(0)
    model = SkipstoneForCausalLM(config)
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    handles = find_handles(model)
    points = [(share, tuple([limit] * len(handles))) for share, limit in ((0.4, 9.0), (0.43, 0.0), (0.46, -9.0))]
    BudgetTable(
        handles=tuple(handle.name for handle in handles),
        trained=tuple(tuple(handle.state()) for handle in handles),
        points=tuple(OperatingPoint(share=s, thresholds=t, kept=(0.5,) * len(handles)) for s, t in points),
        tokens=96,
        rows=1,
    ).save(folder)
    return folder
