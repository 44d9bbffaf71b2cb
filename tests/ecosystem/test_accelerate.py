"""`accelerate launch` runs the training script of docs/ecosystem.md on two processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from ecosystem.tool import load, logits, shell
from pages import Page


@pytest.mark.slow
def test_two_processes_train_one_model(page: Page, work: Path) -> None:
    (work / "train.py").write_text(page.block("trainer.train()"), encoding="utf-8")
    said = shell(page.command("accelerate launch"), work)
    losses = set(re.findall(r"([\d.]+) on 2", said))
    assert len(losses) == 1  # both processes say the same
    assert not logits(load("tuned")).equal(logits(load("my-model")))
