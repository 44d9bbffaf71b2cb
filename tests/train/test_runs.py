"""`Run`, the reader of run folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from skipstone.data.config import DataConfig
from skipstone.runs import Run, last_checkpoint
from train.tool import MODELS, recipe, train, weights


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs")
    return train(recipe(folder, MODELS["all"], steps=6), folder / "made")


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_everything_is_read_back(folder: Path) -> None:
    run = Run(folder)
    assert (run.name, run.finished, run.is_saved_model) == ("run", True, False)
    assert run.config()["model"]["hidden_size"] == 32
    assert run.environment()["seed"] == 0
    assert run.result()["steps"] == 6
    assert [line["step"] for line in run.metrics() if line["split"] == "train"] == [1, 3, 6]
    assert isinstance(run.data_config(), DataConfig)
    model, tokenizer = run.load_model(), run.load_tokenizer()
    assert not model.training
    assert tokenizer is not None
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in weights(folder).items())
    data = run.data()
    assert data.train is None
    assert data.vocab_size == len(tokenizer) == model.config.vocab_size
    assert run.data(train=True).train is not None


def test_the_validation_loss_is_that_of_the_model_read_back(made: Path) -> None:
    run = Run(made)
    data, model = run.data(), run.load_model()
    batch = data.collate([data.validation[i] for i in range(6)])
    for routing in ("oracle", "causal"):
        with torch.no_grad():
            loss = model(**batch, routing=routing, noise=False).token_loss.item()
        assert run.result()["validation"][f"{routing}_loss"] == pytest.approx(loss, rel=1e-5)


def test_a_saved_model_serves_where_that_makes_sense(folder: Path) -> None:
    run = Run(folder / "model")
    assert run.is_saved_model
    assert run.load_model().config.hidden_size == 32
    assert run.load_tokenizer() is not None
    for read in (run.config, run.metrics, run.environment, run.result):
        with pytest.raises(ValueError, match="is a saved model, not a run: it has no"):
            read()


def test_an_unfinished_run_gives_its_last_checkpoint(folder: Path) -> None:
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "model")
    run = Run(folder)
    assert last_checkpoint(folder) == folder / "checkpoints" / "checkpoint-6"
    with pytest.warns(UserWarning, match="is not finished; using its checkpoint-6"):
        run.load_model()
    with pytest.raises(ValueError, match="is not finished"):
        run.result()
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(ValueError, match="neither a final model nor a checkpoint"):
        run.load_model()


def test_folders_that_are_no_runs(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="does not exist"):
        Run(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="is neither a run folder"):
        Run(tmp_path)


def test_broken_files_are_one_line(folder: Path) -> None:
    (folder / "result.json").write_text("{")
    (folder / "config.yaml").write_text("- 1\n")
    (folder / "environment.json").unlink()
    run = Run(folder)
    with pytest.raises(ValueError, match=r"result.json' cannot be read"):
        run.result()
    with pytest.raises(ValueError, match="is not a recipe: it needs model, data and train"):
        run.config()
    with pytest.raises(ValueError, match=r"is incomplete: it has no environment\.json"):
        run.environment()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "spl')
    assert run.metrics()[-1]["step"] == 6


def test_a_checkpoint_of_another_version_or_with_other_keys(folder: Path) -> None:
    config = folder / "model" / "config.json"
    (folder / "model" / "files.json").unlink()  # which would call any change damage
    values = json.loads(config.read_text())
    config.write_text(json.dumps({**values, "format_version": 99}))
    with pytest.raises(ValueError, match="format_version 99"):
        Run(folder).load_model()
    config.write_text(json.dumps({**values, "qk_norm": True}))
    with pytest.raises(ValueError, match="the checkpoint lacks"):
        Run(folder).load_model()
