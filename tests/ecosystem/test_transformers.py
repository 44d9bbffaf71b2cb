"""transformers' own tools: pipelines, Trainer, device_map, a classification head."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from ecosystem.tool import TOOLS_OWN_WARNINGS, load, logits
from pages import Page
from skipstone import SkipstoneForSequenceClassification

pytestmark = pytest.mark.filterwarnings(TOOLS_OWN_WARNINGS)


def test_a_pipeline_writes_what_generate_writes(page: Page, names: dict[str, Any]) -> None:
    exec(page.block('pipeline("text-generation"'), names)
    write, tokenizer = names["write"], names["tokenizer"]
    [alone] = write("The dog", max_new_tokens=8, do_sample=False)
    [_, [batched]] = write(["Once upon a time", "The dog"], batch_size=2, max_new_tokens=8, do_sample=False)
    assert batched == alone
    given = tokenizer("The dog", return_tensors="pt")
    row = load("my-model").eval().generate(**given, max_new_tokens=8, do_sample=False)[0]
    assert alone["generated_text"] == tokenizer.decode(row, skip_special_tokens=True)


def test_the_stock_trainer(page: Page, names: dict[str, Any]) -> None:
    before = logits(load("my-model"))
    exec(page.block("trainer.train()"), names)
    trainer = names["trainer"]
    tuned = trainer.model.eval()
    assert not torch.equal(logits(tuned), before)
    torch.testing.assert_close(logits(load("tuned")), logits(tuned))
    batch = trainer.data_collator([trainer.eval_dataset[i] for i in range(8)])
    with torch.no_grad():
        expected = tuned(**batch).loss.item()
    assert trainer.evaluate(trainer.eval_dataset[:8])["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_predictions_are_logits_alone(names: dict[str, Any], work: Path) -> None:
    tokenizer = names["tokenizer"]
    rows = [{"input_ids": ids, "labels": ids} for ids in tokenizer(["The dog ran", "The cat ran"])["input_ids"]]
    seen = {}

    def note(prediction: Any) -> dict[str, float]:
        seen["shape"], seen["labels"] = prediction.predictions.shape, prediction.label_ids.shape
        return {}

    settings = TrainingArguments("out", use_cpu=True, report_to="none")
    trainer = Trainer(load("my-model"), settings, eval_dataset=rows, compute_metrics=note)
    assert math.isfinite(trainer.evaluate()["eval_loss"])
    assert seen == {"shape": (2, 11, len(tokenizer)), "labels": (2, 11)}


def test_device_map_auto(work: Path) -> None:
    model = load("my-model", device_map="auto")
    torch.testing.assert_close(logits(model).cpu(), logits(load("my-model")), atol=1e-4, rtol=1e-4)


def test_a_head_for_classes(page: Page, names: dict[str, Any]) -> None:
    exec(page.block("AutoModelForSequenceClassification"), names)
    classifier, tokenizer = names["classifier"], names["tokenizer"]
    assert isinstance(classifier, SkipstoneForSequenceClassification)
    assert names["scores"].shape == (2, 3)
    again = AutoModelForSequenceClassification.from_pretrained("my-classifier").eval()
    pair = tokenizer(["Once upon a time", "The dog"], padding=True, return_tensors="pt")
    with torch.no_grad():
        batched = again(**pair).logits
        torch.testing.assert_close(batched, classifier.eval()(**pair).logits)
        alone = again(**tokenizer("The dog", return_tensors="pt")).logits
    torch.testing.assert_close(batched[1:], alone, atol=1e-5, rtol=1e-5)


def test_the_head_learns(names: dict[str, Any]) -> None:
    tokenizer = names["tokenizer"]
    model = AutoModelForSequenceClassification.from_pretrained("my-model", num_labels=2, training_routing="causal")
    texts = tokenizer(["aaaa", "bbbb", "aabaa", "babbb"], padding=True, return_tensors="pt")
    labels = torch.tensor([0, 1, 0, 1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(30):
        loss = model.train()(**texts, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert model.eval()(**texts).logits.argmax(-1).tolist() == labels.tolist()


def test_texts_of_a_batch_need_a_pad_token(names: dict[str, Any]) -> None:
    model = AutoModelForSequenceClassification.from_pretrained("my-model", pad_token_id=None)
    with pytest.raises(ValueError, match="no padding token"):
        model(torch.zeros(2, 3, dtype=torch.long))
