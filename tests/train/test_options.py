"""Precision, accumulation, checkpointing and compilation work with every mechanism."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from skipstone.model.causal_lm import SkipstoneForCausalLM
from skipstone.nn.attention import Attention
from skipstone.train import training
from skipstone.train.recipe import TrainConfig
from skipstone.train.trainer import RunTrainer
from skipstone.train.watch import Interrupted
from train.tool import DENSE, MODELS, QUIET, at_step, equal, lines, quick, recipe, train, weights


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder, "train")]


@pytest.mark.slow
@pytest.mark.parametrize("name", quick(QUIET, "ema_threshold", "early_exit"))
def test_micro_batches_change_nothing(name: str, tmp_path: Path) -> None:
    """One batch of 8 rows and 4 of 2 are the same step: the losses are sums over the step's labels."""
    config = {"batch_size": 8, "steps": 6, "log_every": 1, "eval_every": 0, "learning_rate": 1e-3}
    one = train(recipe(tmp_path, QUIET[name], **config), tmp_path / "one")
    four = train(recipe(tmp_path, QUIET[name], **config, gradient_accumulation=4), tmp_path / "four")
    first, other = lines(one, "train"), lines(four, "train")
    tolerance = 2e-3 if name == "ema_threshold" else 1e-5  # the mean of four quantiles is not the quantile of all
    for key in ("token_loss", "auxiliary_loss", "grad_norm"):
        assert [line[key] for line in other] == pytest.approx([line[key] for line in first], rel=tolerance, abs=1e-9)
    if name in ("threshold", "predictor", "token_selective", "early_exit"):
        assert first[0]["auxiliary_loss"] > 0


def test_micro_batches_with_unequal_labels_change_nothing(tmp_path: Path) -> None:
    """Packed rows differ in their labels; a mean of means would weigh them wrongly."""
    folder = tmp_path / "texts"
    folder.mkdir()
    for i in range(80):
        (folder / f"{i:03}.txt").write_text(f"number {i} " * (1 + i % 7))
    data = {"corpus": f"text:{folder}", "tokenizer": "byte", "context": 32, "packing": "packed"}
    found = []
    for parts in (1, 4):
        options = {
            "batch_size": 8,
            "steps": 2,
            "eval_every": 0,
            "save_every": 0,
            "log_every": 1,
            "gradient_accumulation": parts,
            "learning_rate": 1e-3,
        }
        config = {**recipe(tmp_path, QUIET["predictor"], **options), "data": data}
        found.append(losses(train(config, tmp_path / str(parts))))
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("name", quick(MODELS, "all"))
def test_bf16_is_autocast(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: set[tuple[bool, torch.dtype]] = set()
    forward = Attention.forward

    def watched(self: Attention, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        y = forward(self, x, *args, **kwargs)
        seen.add((torch.is_autocast_enabled("cpu"), y.dtype))
        return y

    monkeypatch.setattr(Attention, "forward", watched)
    config = recipe(tmp_path, MODELS[name], steps=3, eval_every=3, save_every=0, learning_rate=1e-3)
    config["train"]["device"] = "cpu"
    exact = train(config, tmp_path / "fp32")
    assert seen == {(False, torch.float32)}
    seen.clear()
    config["train"]["precision"] = "bf16"
    rounded = train(config, tmp_path / "bf16")
    assert seen == {(True, torch.bfloat16)}
    assert losses(rounded) != losses(exact)
    assert losses(rounded) == pytest.approx(losses(exact), rel=0.02)
    assert {value.dtype for value in weights(rounded).values()} <= {torch.float32, torch.int64}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_activation_checkpointing_changes_nothing(name: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS[name], steps=4, eval_every=0)
    plain = train(config, tmp_path / "plain")
    config["train"]["activation_checkpointing"] = True
    saved = train(config, tmp_path / "saved")
    assert equal(weights(plain), weights(saved))
    assert lines(plain) == lines(saved)


def test_activation_checkpointing_is_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block that is checkpointed everything is computed twice."""
    calls = []
    forward = Attention.forward
    monkeypatch.setattr(
        Attention, "forward", lambda self, *a, **k: calls.append(self.training) or forward(self, *a, **k)
    )
    for wanted in (False, True):
        train(recipe(tmp_path, DENSE, steps=3, activation_checkpointing=wanted), tmp_path / str(wanted))
    assert sum(calls) == 3 * 2 + 3 * 2 * 2


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("name", QUIET)
def test_compiled_blocks_train_alike(name: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    config = recipe(tmp_path, QUIET[name], steps=4, eval_every=2, learning_rate=1e-3)
    plain = train(config, tmp_path / "plain")
    torch._dynamo.utils.counters.clear()
    config["train"]["compile"] = True
    compiled = train(config, tmp_path / "compiled")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    assert losses(compiled) == pytest.approx(losses(plain), rel=1e-4)
    assert weights(plain).keys() == weights(compiled).keys()


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.filterwarnings("ignore")
def test_everything_at_once_trains_and_resumes_exactly(tmp_path: Path) -> None:
    torch._dynamo.reset()
    options = {"compile": True, "precision": "bf16", "activation_checkpointing": True, "gradient_accumulation": 2}
    config = recipe(tmp_path, MODELS["all"], **options)
    whole = train(config, tmp_path / "whole")
    assert losses(whole)[-1] < losses(whole)[0]
    with at_step(7, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(config, tmp_path / "stopped")
    train(config, tmp_path / "stopped", resume=True)
    assert equal(weights(whole), weights(tmp_path / "stopped"))
    assert lines(whole) == lines(tmp_path / "stopped")


@pytest.mark.slow
def test_rows_are_those_of_the_step_however_they_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Tensor] = []
    compute = RunTrainer.compute_loss

    def watched(self: RunTrainer, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(inputs["input_ids"])
        return compute(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(RunTrainer, "compute_loss", watched)
    for parts in (1, 2):
        train(recipe(tmp_path, DENSE, steps=3, gradient_accumulation=parts), tmp_path / str(parts))
    assert [len(rows) for rows in seen] == [4] * 3 + [2] * 6
    assert torch.equal(torch.cat(seen[:3]), torch.cat(seen[3:]))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["predictor", "polyglu"])
def test_the_loss_in_chunks_trains_alike(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = train(recipe(tmp_path, QUIET[name], loss_chunk=0), tmp_path / "whole")
    handed_out: list[bool] = []
    forward = SkipstoneForCausalLM.forward

    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = forward(self, *args, **kwargs)
        handed_out.append(out.logits is not None)
        return out

    monkeypatch.setattr(SkipstoneForCausalLM, "forward", watched)
    monkeypatch.setattr(training, "_keep_view", lambda *given: None)  # a look that has logits
    chunked = train(recipe(tmp_path, QUIET[name], loss_chunk=50, gradient_accumulation=2), tmp_path / "chunked")
    assert set(handed_out) == {False}, "validation builds no logits either"
    for split, key in (("train", "loss"), ("validation", "oracle_loss"), ("validation", "causal_loss")):
        losses_of = [[line[key] for line in lines(folder, split)] for folder in (whole, chunked)]
        assert losses_of[0] == pytest.approx(losses_of[1], rel=1e-4)


def test_a_large_vocabulary_takes_chunks_by_itself() -> None:
    asked = {None: (0, 1024), 0: (0, 0), 64: (64, 64)}
    for given, expected in asked.items():
        config = TrainConfig(loss_chunk=given)
        assert (config.loss_chunk_of(49_152), config.loss_chunk_of(151_936)) == expected


def test_biases_and_preferences_do_not_decay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[RunTrainer] = []
    begin = RunTrainer.train
    monkeypatch.setattr(RunTrainer, "train", lambda self, *a, **k: trainers.append(self) or begin(self, *a, **k))
    training.train(recipe(tmp_path, MODELS["all"], steps=1, warmup_steps=0), out=tmp_path / "run", progress=False)
    names = {id(parameter): name for name, parameter in trainers[0].model.named_parameters()}
    decaying, free = ({names[id(p)] for p in group["params"]} for group in trainers[0].optimizer.param_groups)
    assert trainers[0].optimizer.param_groups[0]["weight_decay"] == 0.1
    assert "model.layers.0.mlp.activation.preference_bias" in free
    assert "model.layers.0.mechanisms.mixture_of_depths.router.weight" in decaying
    assert all("bias" in name or "norm" in name for name in free)
    assert not any("bias" in name or "norm" in name for name in decaying)


@pytest.mark.slow
def test_the_loggers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = train(recipe(tmp_path, MODELS["topk"], loggers=["jsonl", "tensorboard"]), tmp_path / "run")
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert {"train/loss", "train/capacity/0/mixture_of_depths", "eval/oracle_loss"} <= set(events.Tags()["scalars"])
    logged = [event.value for event in events.Scalars("train/loss")]
    assert logged == pytest.approx(losses(folder))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackio needs a package: pip install 'skipstone\[trackio\]'"):
        train(recipe(tmp_path, DENSE, loggers=["trackio"]), tmp_path / "other")
    with pytest.raises(ValueError, match=r"wandb needs a package: pip install 'skipstone\[wandb\]'"):
        train(recipe(tmp_path, DENSE, loggers=["wandb"]), tmp_path / "other")
