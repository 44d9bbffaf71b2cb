"""The model that the repository holds: it loads, reads Python code better than a table of bytes, and writes text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from skipstone.generate import generate
from skipstone.model.pretrained import load_model, load_tokenizer

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "models/segment-boundary-10m"
MOST_MB = 13
CONTEXT = 512


@pytest.fixture(scope="module")
def released() -> torch.nn.Module:
    return load_model(MODEL).eval()


def test_it_reads_code_that_it_has_not_seen(released: torch.nn.Module) -> None:
    code = (ROOT / "src/skipstone/runs.py").read_bytes()[-CONTEXT:]
    ids = torch.tensor([[*code]])
    with torch.no_grad():
        out = released(ids, labels=ids, output_records=True)
    assert out.loss < 1.3  # nats a byte; a table of single bytes has more than 3
    kept = out.records[2]["segment"].kept_BT.float().mean()
    assert 0.08 < kept < 0.25


def test_it_continues_text(released: torch.nn.Module) -> None:
    tokenizer = load_tokenizer(MODEL)
    assert tokenizer is not None
    ids = torch.tensor([tokenizer("class Stack:\n    def __in", add_special_tokens=False)["input_ids"]])
    made = generate(released, ids, max_new_tokens=4)
    assert tokenizer.decode(made[0, ids.shape[1] :]) == "it__"


def test_it_stays_small_and_has_a_card() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < MOST_MB * 1e6
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    assert "## Training" in card
    assert "license:" in card
