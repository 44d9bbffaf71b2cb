"""lm-evaluation-harness: `skipstone eval --tasks`, and its own command on a saved model."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch

from ecosystem.conftest import ROWS
from ecosystem.tool import TOOLS_OWN_WARNINGS, load, shell, stirred
from pages import Page
from skipstone import SkipstoneConfig
from skipstone.data.tokenizers import byte_tokenizer
from skipstone.evaluate import harness
from skipstone.evaluate.harness import evaluate_tasks
from skipstone_cli.main import main

needs_harness = pytest.mark.skipif(harness.find_spec("lm_eval") is None, reason="lm_eval is not installed")
pytestmark = pytest.mark.filterwarnings(TOOLS_OWN_WARNINGS)

CHOICE = """
task: parity
dataset_path: json
dataset_kwargs: {data_files: {test: gsm8k.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: ["even", "odd"]
doc_to_target: 0
metric_list: [{metric: acc}]
"""


def bits_per_byte() -> float:
    """By hand: what `my-model` needs for the questions, each by itself, behind one end-of-text."""
    model, tokenizer = load("my-model").eval(), byte_tokenizer()
    nats = size = 0.0
    for row in ROWS:
        ids = torch.tensor([[tokenizer.eos_token_id, *tokenizer(row["question"])["input_ids"]]])
        with torch.no_grad():
            nats -= model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).sum().item()
        size += len(row["question"].encode())
    return nats / math.log(2) / size


@needs_harness
def test_scores_are_those_of_the_pass_that_generates(work: Path) -> None:
    (work / "tasks" / "parity.yaml").write_text(CHOICE, encoding="utf-8")
    figures = evaluate_tasks(Path("my-model"), ["arithmetic", "parity"], include_path=Path("tasks"), batch_size=3)
    scores = {score.task: score for score in figures.scores}
    assert scores["arithmetic"].value == pytest.approx(bits_per_byte(), rel=1e-4)
    assert scores["arithmetic"].metric == "bits_per_byte"
    assert scores["arithmetic"].samples == len(ROWS)
    assert scores["parity"].error is not None
    assert "| arithmetic | bits_per_byte |" in figures.markdown()


@needs_harness
@pytest.mark.slow
def test_a_tokenizer_that_adds_bos_scores_each_text_behind_one(work: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    tokenizer, end = AutoTokenizer.from_pretrained("my-model"), byte_tokenizer().eos_token
    tokenizer.bos_token = end
    special = [(end, tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{end} $A", special_tokens=special)
    tokenizer.save_pretrained("my-model")
    assert AutoTokenizer.from_pretrained("my-model")("a")["input_ids"][0] == tokenizer.eos_token_id
    [score] = evaluate_tasks(Path("my-model"), ["arithmetic"], include_path=Path("tasks")).scores
    assert score.value == pytest.approx(bits_per_byte(), rel=1e-4)


@needs_harness
def test_the_command(page: Page, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", [*page.command("skipstone eval"), "--limit", "2", "--json", "scores.json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    [score] = json.loads(Path("scores.json").read_text(encoding="utf-8"))["scores"]
    assert (score["task"], score["samples"]) == ("arithmetic", 2)


@needs_harness
@pytest.mark.slow
@pytest.mark.parametrize("words", ["skipstone run-module lm_eval", "--trust_remote_code"])
def test_the_harness_by_itself(page: Page, work: Path, words: str) -> None:
    table = shell(page.command(words), work)
    [value] = re.findall(r"\|bits_per_byte\s*\|↓\s*\|\s*([\d.]+)\|", table)
    assert float(value) == pytest.approx(bits_per_byte(), rel=1e-3)


@needs_harness
@pytest.mark.parametrize(
    ("tasks", "folder", "says"),
    [
        (["arithmetik"], "tasks", "unknown task 'arithmetik'; did you mean 'arithmetic'"),
        (["arithmetic"], "absent", "folder of tasks 'absent' does not exist"),
    ],
)
def test_mistakes(tasks: list[str], folder: str, says: str, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval import tasks as known

    class Few(known.TaskManager):  # without the harness's own thousands
        def __init__(self, include_path: str | None, include_defaults: bool = False) -> None:
            super().__init__(include_path=include_path, include_defaults=False)

    monkeypatch.setattr(known, "TaskManager", Few)
    with pytest.raises((ValueError, FileNotFoundError), match=says):
        evaluate_tasks(Path("my-model"), tasks, include_path=Path(folder))


def test_without_the_harness(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"--tasks needs a package: pip install 'skipstone\[eval\]'"):
        evaluate_tasks(Path("my-model"), ["arithmetic"])


@needs_harness
def test_what_cannot_be_scored(tmp_path: Path) -> None:
    topk = {"name": "mixture_of_depths", "capacity": 0.5, "decision": "topk"}
    sizes = {"vocab_size": 258, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    stirred(SkipstoneConfig(**sizes, mechanisms=[topk])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no tokenizer"):
        evaluate_tasks(tmp_path, ["arithmetic"])
    byte_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks" / "parity.yaml").write_text(CHOICE, encoding="utf-8")
    with pytest.raises(ValueError, match="'topk' ranks the whole row"):
        evaluate_tasks(tmp_path, ["parity"], include_path=tmp_path / "tasks")
