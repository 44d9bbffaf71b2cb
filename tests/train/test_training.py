"""`train` turns a recipe into a finished run folder, and refuses invalid ones."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from skipstone.runs import Run
from skipstone.train import training
from train.tool import DENSE, MODELS, POLYGLU, TSA, equal, lines, mod, recipe, train, weights


def test_a_run_folder_is_complete(tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS["all"], steps=6, save_every=4)
    folder = train(config, tmp_path / "run")
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "result.json", "tokenizer", "checkpoints", "model",
        "view.json",
    }  # fmt: skip
    resolved = yaml.safe_load((folder / "config.yaml").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    assert resolved["model"]["vocab_size"] == len(tokenizer)
    assert resolved["model"]["max_position_embeddings"] == 32
    assert resolved["train"]["steps"] == 6
    environment = json.loads((folder / "environment.json").read_text())
    assert environment.keys() >= {"skipstone", "torch", "transformers", "python", "git_commit", "git_dirty", "machine"}
    assert environment.keys() >= {"seed", "started", "command", "processes"}
    result = json.loads((folder / "result.json").read_text())
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert result["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (result["steps"], result["tokens"]) == (6, 6 * 4 * 32)
    assert result["tokens_per_second"] > 0
    assert 0 < result["seconds"] < 300
    assert result["validation"].keys() == {"oracle_loss", "causal_loss"}
    assert model.config.use_cache
    assert "README.md" in {path.name for path in (folder / "model").iterdir()}


@pytest.mark.slow
def test_the_resolved_recipe_gives_the_same_run(tmp_path: Path) -> None:
    one = train(recipe(tmp_path, MODELS["all"], steps=4), tmp_path / "one")
    other = train(Run(one).config(), tmp_path / "other")
    assert equal(weights(one), weights(other))
    assert lines(one) == lines(other)
    assert Run(one).config() == Run(other).config()


def test_metrics_have_their_names(tmp_path: Path) -> None:
    model = {**DENSE, "mechanisms": [mod("ema_threshold"), TSA], "activation": POLYGLU}
    folder = train(recipe(tmp_path, model), tmp_path / "run")
    training, validation = lines(folder, "train"), lines(folder, "validation")
    assert [line["step"] for line in training] == [1, 3, 6, 9, 12]
    assert [line["step"] for line in validation] == [5, 10, 12]
    names = {f"{kind}/{layer}/{name}" for kind in ("capacity", "gate") for layer in (0, 1)
             for name in ("mixture_of_depths", "token_selective")}  # fmt: skip
    mix = ("entropy", "diversity", "dynamic_entropy", "static_entropy")
    names |= {f"{kind}/{layer}/polyglu" for kind in mix for layer in (0, 1)}
    assert all(line.keys() >= names for line in training + validation)
    moving = {"tau", "threshold/0/mixture_of_depths", "threshold/1/mixture_of_depths"}
    always = {"loss", "token_loss", "auxiliary_loss", "learning_rate", "grad_norm"}
    assert all(line.keys() >= moving | always for line in training)
    assert all(math.isclose(line["loss"], line["token_loss"] + line["auxiliary_loss"]) for line in training)
    assert [line["tau"] for line in training] == pytest.approx([1 - 0.9 * step / 12 for step in (1, 3, 6, 9, 12)])
    assert training[-1]["token_loss"] < training[0]["token_loss"]
    raw = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line["tokens_per_second"] > 0 for line in raw if line["split"] == "train")


def test_logged_losses_are_means_over_the_steps_since_the_last_line(tmp_path: Path) -> None:
    model = MODELS["token_selective"]
    alone = {"eval_every": 0, "eval_rows": 1, "save_every": 0}
    each = lines(train(recipe(tmp_path, model, log_every=1, **alone), tmp_path / "each"), "train")
    some = lines(train(recipe(tmp_path, model, log_every=4, **alone), tmp_path / "some"), "train")
    assert [line["step"] for line in some] == [1, 4, 8, 12]
    for name in ("loss", "token_loss", "auxiliary_loss"):
        values = [line[name] for line in each]
        means = [values[0], sum(values[1:4]) / 3, sum(values[4:8]) / 4, sum(values[8:]) / 4]
        assert [line[name] for line in some] == pytest.approx(means, rel=1e-6)


def test_the_learning_rate_warms_up_and_falls_to_its_share(tmp_path: Path) -> None:
    config = recipe(tmp_path, DENSE, log_every=1, steps=10, warmup_steps=4, min_lr_ratio=0.2)
    rates = [line["learning_rate"] for line in lines(train(config, tmp_path / "run"), "train")]
    cosine = [0.01 * (0.2 + 0.8 * (1 + math.cos(math.pi * step / 6)) / 2) for step in range(6)]
    assert rates == pytest.approx([0, 0.0025, 0.005, 0.0075, *cosine])


def test_topk_has_no_causal_loss_and_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = train(recipe(tmp_path, MODELS["topk"], steps=6), tmp_path / "run")
    assert [line["causal_loss"] for line in lines(folder, "validation")] == [None, None]
    assert Run(folder).result()["validation"]["causal_loss"] is None
    assert capsys.readouterr().err.count("no causal loss in validation") == 1


def test_forced_by_known_difficulty(tmp_path: Path) -> None:
    model = {**DENSE, "mechanisms": [mod("forced", weight="none")]}
    data = {"corpus": "reset-s3", "context": 64, "validation_rows": 8}
    config = {**recipe(tmp_path, model, routing="difficulty", steps=3), "data": data}
    folder = train(config, tmp_path / "run")
    rows = Run(folder).data(train=True)
    assert rows.train is not None
    wanted = torch.stack([rows.train[i]["difficulty"] >= 0 for i in range(4)]).float().mean().item()
    assert lines(folder, "train")[0]["capacity/0/mixture_of_depths"] == pytest.approx(wanted)
    assert lines(folder, "validation")[-1]["capacity/1/mixture_of_depths"] == pytest.approx(0.25, abs=0.05)
    assert Run(folder).load_tokenizer() is None


@pytest.mark.slow
def test_a_preset_with_changes(tmp_path: Path) -> None:
    config = recipe(tmp_path, {"preset": "tiny", "hidden_size": 32, "num_hidden_layers": 1}, steps=1, warmup_steps=0)
    model = Run(train(config, tmp_path / "run")).config()["model"]
    assert (model["hidden_size"], model["num_key_value_heads"], model["max_position_embeddings"]) == (32, 2, 32)


def test_a_diverged_run_stops_with_one_line(tmp_path: Path) -> None:
    config = recipe(tmp_path, DENSE, learning_rate=1e38, warmup_steps=0, max_grad_norm=0, save_every=2)
    with pytest.raises(
        ValueError, match=r"stopped at step 2: .* (is|are) not finite on training rows 4 to 7; there is no checkpoint"
    ) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"hiden_size": 32}}, "did you mean 'hidden_size'"),
        ({"model": {"preset": "tny"}}, "unknown preset 'tny'; did you mean 'tiny'"),
        ({"model": {**DENSE, "mechanisms": [{"name": "mixture_of_dephts"}]}}, "did you mean 'mixture_of_depths'"),
        (
            {"model": {**DENSE, "max_position_embeddings": 16}},
            r"max_position_embeddings \(16\) is shorter than data.con",
        ),
        ({"model": {**DENSE, "vocab_size": 5}}, r"vocab_size \(5\) is too small: the tokenizer has"),
        ({"train": {"optimiser": "sgd"}}, "unknown key in train 'optimiser'"),
        ({"data": {"corpus": "text:nowhere.txt"}}, "no file or folder 'nowhere.txt'"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    config = {**recipe(tmp_path, DENSE), **change}
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        train(config, tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_an_existing_folder_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="exists already and nothing is overwritten"):
        train(recipe(tmp_path, DENSE), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["mine.txt"]


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    """A recipe and its run, not finished."""
    config = recipe(tmp_path_factory.mktemp("begun"), DENSE, steps=2)
    folder = train(config, tmp_path_factory.mktemp("begun") / "run")
    (folder / "result.json").unlink()
    return config, folder


@pytest.mark.parametrize(
    ("part", "key", "value", "message"),
    [
        ("train", "learning_rate", 0.5, r"differs from the run's in train.learning_rate: 0.01 there, 0.5 now"),
        ("model", "hidden_size", 64, r"differs from the run's in model.hidden_size: 32 there, 64 now"),
        ("data", "seed", 3, r"differs from the run's in data.seed: 0 there, 3 now"),
    ],
)
def test_a_changed_recipe_is_not_resumed(
    part: str, key: str, value: Any, message: str, begun: tuple[dict[str, Any], Path]
) -> None:
    config, folder = begun
    with pytest.raises(ValueError, match=message):
        train({**config, part: {**config[part], key: value}}, folder, resume=True)


def test_nothing_to_resume(tmp_path: Path) -> None:
    config = recipe(tmp_path, DENSE)
    with pytest.raises(FileNotFoundError, match="does not exist: nothing to resume"):
        train(config, tmp_path / "run", resume=True)
    (tmp_path / "run").mkdir()
    with pytest.raises(ValueError, match="is neither a run folder"):
        train(config, tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="name it with --out"):
        training.train(config, resume=True)


def test_an_option_without_effect_warns(tmp_path: Path) -> None:
    config = recipe(tmp_path, DENSE, steps=1, warmup_steps=0)
    config["data"]["train_rows"] = 3
    with pytest.warns(UserWarning, match=r"data\.train_rows has no effect on training"):
        train(config, tmp_path / "run")


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = recipe(tmp_path, DENSE, steps=1, warmup_steps=0)
    assert training.train({**config, "name": "mine"}, progress=False) == Path("runs/mine")
    with pytest.raises(FileExistsError, match="'runs/mine' exists already"):
        training.train({**config, "name": "mine"}, progress=False)
    assert training.train(config, progress=False).name.startswith("text-20")


@pytest.mark.slow
def test_shakespeare_is_learned(data_dir: Path, tmp_path: Path) -> None:
    if not (data_dir / "tiny-shakespeare" / "input.txt").is_file():
        pytest.skip("no tiny-shakespeare in SKIPSTONE_DATA")
    model = {"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
    model |= {"mechanisms": [mod("predictor") | {"layers": "1::2"}], "activation": POLYGLU}
    data = {"corpus": "tiny-shakespeare", "context": 64}
    options = {
        "steps": 200,
        "batch_size": 16,
        "warmup_steps": 20,
        "learning_rate": 3e-3,
        "eval_every": 0,
        "eval_rows": 128,
    }
    folder = train({"model": model, "data": data, "train": options}, tmp_path / "run")
    losses = Run(folder).result()["validation"]
    assert losses["oracle_loss"] < 2.4  # 2.45 nats: the entropy of a character given the one before it
    assert losses["causal_loss"] < 2.6
