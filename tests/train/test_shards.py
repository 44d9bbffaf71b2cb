"""Training from shards resumes at its exact position, and refuses other data."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from skipstone.data.blend import BlendedWindows
from skipstone.data.sharding import write_shards
from skipstone.runs import Run
from skipstone.train.watch import Interrupted
from train.test_config import RECIPES
from train.test_resume import same
from train.tool import MODELS, SENTENCE, at_step, lines, recipe, train

BLEND = {"start": {"one": 3, "two": 1}, "end": {"two": 1}, "anneal_from": 0.5}


def config(folder: Path, **options: Any) -> dict[str, Any]:
    """12 steps of 4 rows of 32 tokens, more than there are: some are read twice."""
    for name in ("one", "two"):
        path = folder / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i * i} {SENTENCE[i:]}"}) + "\n" for i in range(20)))
        write_shards(f"jsonl:{path}", folder / "shards" / name, tokenizer="byte", split="70-30", shard_tokens=300)
    data = {"corpus": f"shards:{folder / 'shards'}", "context": 32, "packing": "packed", "blend": BLEND}
    return {**recipe(folder, MODELS["polyglu"], **options), "data": data}


@pytest.mark.slow
def test_resuming_is_exact_and_reads_nothing_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = config(tmp_path)
    whole = train(wanted, tmp_path / "whole")
    with at_step(7, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(wanted, tmp_path / "cut")
    read: list[int] = []
    batch = BlendedWindows.batch

    def watched(self: BlendedWindows, index_B: np.ndarray[Any, Any]) -> Any:
        read.extend(index_B.tolist())
        return batch(self, index_B)

    monkeypatch.setattr(BlendedWindows, "batch", watched)
    train(wanted, tmp_path / "cut", resume=True)
    assert read == list(range(7 * 4, 12 * 4))
    assert same(whole, tmp_path / "cut")
    assert len({line["loss"] for line in lines(whole, "train")}) == 5
    assert Run(whole).data_config().blend is not None, "the resolved recipe has it"


def test_a_run_goes_on_with_its_own_shards_only(tmp_path: Path) -> None:
    wanted = config(tmp_path)
    with at_step(7, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(wanted, tmp_path / "cut")
    manifest = tmp_path / "shards" / "two" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"field": null', '"field": "text"'))
    with pytest.raises(ValueError, match=r"the (data|shards) have changed since the run .* began"):
        train(wanted, tmp_path / "cut", resume=True)
    tokens = tmp_path / "shards" / "one" / "train-00000.tokens"
    tokens.write_bytes(tokens.read_bytes()[::-1])
    with pytest.raises(ValueError, match=r"train-00000.tokens is damaged: its SHA-256 is"):
        train(wanted, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_blend_that_asks_for_more_than_there_is(tmp_path: Path) -> None:
    wanted = config(tmp_path, steps=40)
    wanted["data"]["sampling"] = "once"
    with pytest.raises(ValueError, match="training rows of 32 tokens from source 'one', which has"):
        train(wanted, tmp_path / "run")


@pytest.mark.slow
def test_the_published_recipe_trains_from_end_to_end(tmp_path: Path) -> None:
    """Its sizes cut: the same blend, packing, schedules, chunks and precision."""
    values = yaml.safe_load(next(p for p in RECIPES if p.stem == "polychromatic-0.6b").read_text("utf-8"))
    for name in ("math", "web", "code"):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": f"{name} {i * i} {SENTENCE}"}) + "\n" for i in range(20)))
        write_shards(f"jsonl:{path}", tmp_path / "shards" / name, tokenizer="byte", split="70-30")
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    values["model"] |= {**sizes, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 258}
    values["data"] |= {"corpus": f"shards:{tmp_path / 'shards'}", "context": 64}
    values["train"] |= {"steps": 12, "batch_size": 8, "gradient_accumulation": 2, "warmup_steps": 2}
    values["train"] |= {"learning_rate": 0.01, "log_every": 4, "eval_rows": 6, "loss_chunk": 50}
    folder = train(values, tmp_path / "run")
    found = lines(folder, "train")
    assert [line["tau"] for line in found] == pytest.approx([1 - 0.9 * step / 12 for step in (1, 4, 8, 12)])
    assert found[-1]["loss"] < found[0]["loss"] - 0.5
    assert lines(folder, "validation")[-1]["causal_loss"] > 0
    assert found[-1]["learning_rate"] < 1e-3, "a cosine to 0"
