"""A folder as docs/ecosystem.md assumes it: a small model with all kinds of routing, its tokenizer, a few texts."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from ecosystem.tool import MECHANISMS, stirred
from pages import Page
from skipstone import SkipstoneConfig
from skipstone.data.tokenizers import byte_tokenizer

TEXT = [f"Once upon a time there were {n} dogs. They ran to the wood, and the wood was dark.\n" for n in range(12)]
ROWS = [{"question": f"What is {n} and {n}?", "answer": f"It is {2 * n}."} for n in range(8)]


@pytest.fixture(scope="session")
def page() -> Page:
    return Page("docs/ecosystem.md")


@pytest.fixture(scope="session")
def _made(tmp_path_factory: pytest.TempPathFactory, page: Page) -> Path:
    folder = tmp_path_factory.mktemp("ecosystem")
    tokenizer = byte_tokenizer()
    config = SkipstoneConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=256,
        mechanisms=MECHANISMS,
        activation="polyglu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    stirred(config).save_pretrained(folder / "my-model")
    tokenizer.save_pretrained(folder / "my-model")
    (folder / "text.txt").write_text("".join(TEXT), encoding="utf-8")
    (folder / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    (folder / "tasks").mkdir()
    (folder / "tasks" / "arithmetic.yaml").write_text(page.block("arithmetic", "yaml"), encoding="utf-8")
    return folder


@pytest.fixture
def work(_made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a fresh copy of the folder, which is also the working directory of the test."""
    shutil.copytree(_made, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


@pytest.fixture
def names(work: Path) -> dict[str, Any]:
    """Return the names that a code block of the page may use, because earlier blocks have imported or made them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained("my-model")
    known = (AutoModelForCausalLM, AutoTokenizer, pipeline)
    return {**{value.__name__: value for value in known}, "tokenizer": tokenizer}
