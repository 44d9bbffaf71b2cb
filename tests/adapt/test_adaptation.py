"""Adapting a checkpoint: the run folder works with everything else."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

import skipstone
from adapt.sources import mixture, recipe, run, tokenizer
from skipstone.data.sharding import write_shards
from skipstone.evaluate.comparison import compare
from skipstone.evaluate.evaluation import evaluate
from skipstone.generate.text_generation import stream_text
from skipstone.report.rendering import write_report
from skipstone.runs import Run
from skipstone.train.watch import Interrupted
from train.tool import at_step, equal, lines, text_file, weights

DISTILLED = {"language_modelling": 0.5, "distillation": 0.5, "temperature": 2.0, "hidden_states": 0.1}
STAGES = [
    {"train_only": "routers", "steps": 3, "warmup_steps": 1},
    {"train_only": "routers+lora", "steps": 3, "router_learning_rate": 0.01},
    {"train_only": "all", "steps": 2, "learning_rate": 0.001},
]
ALL = {
    "mechanisms": [mixture(layers={"score": "block_influence", "count": 2}), {"name": "early_exit", "layers": [2]}],
    "activation": {"name": "polyglu", "noise": False, "tau_end": 1.0},
}


def everything(folder: Path, **train: Any) -> dict[str, Any]:
    adapt = {"stages": STAGES, "loss": DISTILLED, "budget": 0.8, "start": "measured", "lora": {"dropout": 0.1}}
    return recipe(folder, ALL, adapt, **train)


@pytest.fixture(scope="module")
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return run(source, everything(folder), folder / "whole")


def test_the_folder_is_that_of_a_run(finished: Path) -> None:
    one = Run(finished)
    assert one.finished
    assert one.config()["source"] == json.loads((finished / "adaptation.json").read_text())["source"]
    result = one.result()
    assert result["steps"] == 8
    assert result["within_budget"]
    assert abs(result["executed_share"] / 0.8 - 1) <= 0.05
    assert result["neutral_start"]["difference"] <= 1e-3 * result["neutral_start"]["largest"]
    logged = [line for line in one.metrics() if line["split"] == "train"]
    assert {"distillation_loss", "hidden_loss"} <= set(logged[0])
    assert logged[0]["loss"] == pytest.approx(logged[0]["token_loss"] + logged[0]["auxiliary_loss"])


def test_what_was_measured_before_is_kept(finished: Path) -> None:
    record = json.loads((finished / "adaptation.json").read_text())
    scores, chosen = record["block_influence"], record["mechanisms"][0]["layers"]
    assert chosen == sorted(sorted(range(3), key=lambda i: scores[i])[:2])
    assert 0 < record["capacity"] < 1
    assert record["dense_flops_per_token"] > 0


def test_the_first_step_is_the_teachers(finished: Path) -> None:
    """Nothing is left to learn from the teacher in a neutral student."""
    first = Run(finished).metrics()[0]
    assert first["distillation_loss"] < 1e-3 * first["token_loss"]
    assert first["hidden_loss"] < 1e-4


def test_the_model_is_an_ordinary_one(finished: Path) -> None:
    assert skipstone.SkipstoneConfig is not None
    saved = load_file(finished / "model" / "model.safetensors")
    assert not any("lora" in name or "base_layer" in name for name in saved)
    theirs = AutoModelForCausalLM.from_pretrained(finished / "model").eval()
    ours = Run(finished).load_model()
    ids = torch.arange(20)[None]
    assert torch.equal(theirs(ids).logits, ours(ids).logits)
    write = pipeline("text-generation", model=str(finished / "model"), device="cpu")
    text = write("it was ", max_new_tokens=3, do_sample=False)[0]["generated_text"]
    assert text.startswith("it was ")


@pytest.mark.slow
def test_every_verb_takes_it(finished: Path, source: Path, tmp_path: Path) -> None:
    figures = evaluate(finished).to_dict()
    assert figures["ways"]["executed"]["loss"] == pytest.approx(figures["ways"]["causal"]["loss"], abs=1e-5)
    assert not figures["flops_per_token"]["unknown_operations"]
    other = run(source, recipe(tmp_path, {}, steps=2, warmup_steps=0), tmp_path / "dense")
    assert len(compare([other, finished]).to_dict()["runs"]) == 2
    assert "".join(piece.text for piece in stream_text(finished, "it was ", max_new_tokens=3, greedy=True))
    assert write_report([finished, other], tmp_path / "report.html").is_file()


def same(one: Path, other: Path) -> bool:
    found = [{k: v for k, v in Run(f).result().items() if "second" not in k} for f in (one, other)]
    return equal(weights(one), weights(other)) and lines(one) == lines(other) and found[0] == found[1]


@pytest.mark.parametrize("step", [pytest.param(2, marks=pytest.mark.slow), 4, pytest.param(7, marks=pytest.mark.slow)])
def test_resume_is_exact_in_every_stage(step: int, finished: Path, source: Path, tmp_path: Path) -> None:
    stopped = tmp_path / "stopped"
    config = everything(finished.parent)
    with at_step(step, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        run(source, config, stopped)
    run(source, config, stopped, resume=True)
    assert same(finished, stopped)


@pytest.mark.slow
def test_killed_while_it_closes(finished: Path, source: Path, tmp_path: Path) -> None:
    """What closing has logged is logged once, whether it was killed before its result or before its model."""
    for number, lost in enumerate((["result.json"], ["result.json", "model"])):
        folder = tmp_path / str(number)
        shutil.copytree(finished, folder)
        for name in lost:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink()
        run(source, everything(finished.parent), folder, resume=True)
        assert same(finished, folder)


def test_resume_with_another_source_is_refused(finished: Path, source: Path, tmp_path: Path) -> None:
    stopped = shutil.copytree(finished, tmp_path / "stopped")
    (stopped / "result.json").unlink()
    other = shutil.copytree(source, tmp_path / "other")
    with pytest.raises(ValueError, match="differs from the run's in source"):
        run(other, everything(finished.parent), stopped, resume=True)


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"gradient_accumulation": 2}, id="parts", marks=pytest.mark.slow),
        pytest.param({"loss_chunk": 7}, id="chunks", marks=pytest.mark.slow),
        pytest.param({"gradient_accumulation": 2, "loss_chunk": 7}, id="both"),
    ],
)
def test_micro_batches_and_chunks_change_nothing(changed: dict[str, int], source: Path, tmp_path: Path) -> None:
    """Every term is a sum over tokens by the number of those of the whole step, however many logits exist at a time."""
    model = {"mechanisms": [mixture(capacity=0.5)]}
    # the share of kept tokens is measured on a micro-batch, so thresholds are compared where none has moved yet
    folders = {
        name: run(
            source, recipe(tmp_path, model, {"loss": DISTILLED}, steps=1, warmup_steps=0, **more), tmp_path / name
        )
        for name, more in {"whole": {}, "changed": changed}.items()
    }
    (one, two), (ours, theirs) = zip(*((lines(f, "train")[0], weights(f)) for f in folders.values()), strict=True)
    for key in ("loss", "token_loss", "auxiliary_loss", "distillation_loss", "hidden_loss", "grad_norm"):
        assert one[key] == pytest.approx(two[key], rel=1e-4, abs=1e-6), key
    assert all(torch.allclose(ours[k], theirs[k], atol=1e-4) for k in ours if "threshold" not in k)


@pytest.mark.slow
def test_gates_keep_a_budget_too(source: Path, tmp_path: Path) -> None:
    model = {"mechanisms": [{"name": "token_selective", "layers": ":", "depth_weight": 0.0}]}
    adapt = {"budget": 0.85, "router_learning_rate": 0.05, "stages": [{"steps": 6}, {"steps": 4, "routing": "causal"}]}
    folder = run(source, recipe(tmp_path, model, adapt), tmp_path / "run")
    assert Run(folder).result()["within_budget"]
    saved = Run(folder).load_model()
    assert saved.config.mechanisms[0]["threshold"] != 0.5
    share = evaluate(folder, batch_size=1).to_dict()["flops_per_token"]
    assert share["counted"] / share["dense"] < 0.95


@pytest.mark.slow
def test_a_gate_that_ranks_tokens_gets_its_capacity(source: Path, tmp_path: Path) -> None:
    """It starts with every token kept, so that it is neutral, and ends with the capacity of its options."""
    model = {"mechanisms": [{"name": "gate_skip", "gate": "token", "on": "mlp", "layers": ":", "capacity": 0.3}]}
    folder = run(source, recipe(tmp_path, model, {"router_learning_rate": 0.03}, steps=4), tmp_path / "run")
    first, *_, last = lines(folder, "validation")
    assert first["capacity/0/gate_skip_on_mlp"] == 1
    assert last["capacity/0/gate_skip_on_mlp"] < 0.8
    assert Run(folder).result()["executed_share"] < 0.95


def test_blocks_can_be_dropped_for_comparison(source: Path, tmp_path: Path) -> None:
    dropped = {"drop_layers": {"score": "block_influence", "count": 1}}
    folder = run(source, recipe(tmp_path, dropped, steps=2, warmup_steps=0), tmp_path / "run")
    assert Run(folder).load_model().config.num_hidden_layers == 2
    result = Run(folder).result()
    assert result["neutral_start"]["difference"] == 0, "compared with the source without that block"
    assert 0.6 < result["executed_share"] < 0.75


@pytest.mark.slow
def test_shards_of_several_texts_by_weight(source: Path, tmp_path: Path) -> None:
    """What is prepared with the source's tokenizer trains it, mixed as the blend says; what is not, is refused."""
    text = text_file(tmp_path)
    for name in ("a", "b"):
        write_shards(f"text:{text}", tmp_path / "shards" / name, tokenizer=f"pretrained:{source}")
    write_shards(f"text:{text}", tmp_path / "bytes", tokenizer="byte")
    given = recipe(tmp_path, {"mechanisms": [mixture(capacity=0.5)]})
    blended = {"corpus": f"shards:{tmp_path / 'shards'}", "context": 32, "blend": {"start": {"a": 3, "b": 1}}}
    folder = run(source, {**given, "data": blended}, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(folder / "model").get_vocab() == tokenizer().get_vocab()
    assert run(source, {**given, "data": blended}, tmp_path / "out", resume=True) == folder
    with pytest.raises(ValueError, match=r"made with another tokenizer than the source's; make it with --tokenizer"):
        run(source, {**given, "data": {"corpus": f"shards:{tmp_path / 'bytes'}", "context": 32}}, tmp_path / "no")
