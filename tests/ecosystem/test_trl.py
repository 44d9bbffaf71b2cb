"""TRL's trainers, unchanged: supervised fine-tuning, DPO, GRPO."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from ecosystem.tool import TOOLS_OWN_WARNINGS, load
from pages import Page

pytest.importorskip("trl")
pytestmark = [pytest.mark.filterwarnings(TOOLS_OWN_WARNINGS), pytest.mark.slow]


def logged(trainer: Any, key: str) -> list[float]:
    return [line[key] for line in trainer.state.log_history if key in line]


def test_supervised_fine_tuning_on_the_assistants_words(page: Page, names: dict[str, Any], work: Path) -> None:
    data = Path(os.environ.get("SKIPSTONE_DATA", "")) / "gsm8k" / "train.jsonl"
    if data.is_file():  # real rows where they are at hand
        lines = data.read_text(encoding="utf-8").splitlines(keepends=True)[:8]
        (work / "gsm8k.jsonl").write_text("".join(lines), encoding="utf-8")
        names["max_length"] = 1024
    exec(page.block("assistant_only_loss").replace("max_length=128", "max_length=1024"), names)
    sft, tokenizer = names["sft"], names["tokenizer"]
    batch = next(iter(sft.get_train_dataloader()))
    ids, labels = batch["input_ids"][0], batch["labels"][0]
    learned = tokenizer.decode(labels[labels != -100])
    answers = [row["messages"][1]["content"] + tokenizer.eos_token for row in names["rows"]]
    assert learned in answers
    assert tokenizer.decode(ids).startswith(names["rows"][answers.index(learned)]["messages"][0]["content"])
    assert load("chat-model").config.mechanisms == load("my-model").config.mechanisms


def test_packed_rows_are_separate_documents(page: Page, names: dict[str, Any]) -> None:
    code = page.block("assistant_only_loss").replace("max_length=128", "max_length=128, packing=True")
    exec(code.replace("assistant_only_loss=True", "assistant_only_loss=False"), names)
    [*batches] = names["sft"].get_train_dataloader()
    positions = batches[0]["position_ids"][0]
    starts = (positions == 0).nonzero()[:, 0].tolist()
    assert len(starts) > 1
    model = names["sft"].model.eval()
    packed = model(input_ids=batches[0]["input_ids"][:1], position_ids=positions[None]).logits
    second = slice(starts[1], starts[2] if len(starts) > 2 else None)
    alone = model(input_ids=batches[0]["input_ids"][:1, second]).logits
    assert (packed[:, second] - alone).abs().max() < 1e-4


@pytest.mark.parametrize("routing", ["causal", "oracle"])
def test_dpo_starts_where_policy_and_reference_agree(page: Page, names: dict[str, Any], routing: str) -> None:
    exec(page.block("DPOTrainer").replace('"causal"', f'"{routing}"'), names)
    margin = logged(names["dpo"], "rewards/margins")[0]
    assert len(logged(names["dpo"], "loss")) == 2
    assert abs(margin) < 1e-5 if routing == "causal" else abs(margin) > 1e-3


@pytest.mark.parametrize("routing", ["causal", "oracle"])
def test_grpo_starts_without_divergence_from_its_reference(page: Page, names: dict[str, Any], routing: str) -> None:
    exec(page.block("from datasets import Dataset").split("dpo = ")[0], names)  # the pairs
    exec(page.block("GRPOTrainer").replace('"causal"', f'"{routing}"'), names)
    divergence = logged(names["grpo"], "kl")[0]
    assert abs(divergence) < 1e-6 if routing == "causal" else divergence > 1e-3
