"""`train.average_last`: the trained model is the mean of the last weights, however the run is resumed."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from skipstone.runs import Run
from skipstone.train.recipe import TrainConfig, read_recipe
from skipstone.train.training import train as train_with
from skipstone.train.watch import Interrupted
from train.tool import MODELS, at_step, equal, lines, recipe, train, weights

SHORT: dict[str, Any] = {"steps": 4, "eval_every": 0, "eval_rows": 1, "save_every": 0}


class Weights(TrainerCallback):
    """Collects a copy of the weights after every step, before they are averaged."""

    def __init__(self) -> None:
        self.seen: list[dict[str, torch.Tensor]] = []

    def on_optimizer_step(self, *args: object, **kwargs: Any) -> None:
        self.seen.append({name: p.detach().clone() for name, p in kwargs["model"].named_parameters()})


def test_the_model_is_the_mean_of_the_last_weights(tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS["all"], average_last=0.5, **SHORT)
    seen = Weights()
    train_with(config, out=tmp_path / "run", progress=False, callbacks=[seen])
    steps = len(seen.seen)
    count = TrainConfig(steps=steps, average_last=0.5).averaged_steps
    assert 1 < count < steps
    saved = dict(Run(tmp_path / "run").load_model().named_parameters())
    for name, parameter in saved.items():
        mean = torch.stack([one[name] for one in seen.seen[-count:]]).mean(0)
        torch.testing.assert_close(parameter.detach(), mean, rtol=1e-5, atol=1e-7)
    plain = train(recipe(tmp_path, MODELS["all"], **SHORT), tmp_path / "plain")
    last = dict(Run(plain).load_model().named_parameters())
    assert all(torch.equal(last[name].detach(), seen.seen[-1][name]) for name in last)  # the course is the same
    assert any(not torch.equal(last[name], saved[name]) for name in last)


@pytest.mark.slow
def test_a_run_that_stops_while_it_averages_resumes_exactly(tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS["random"], average_last=0.6)
    whole = train(config, tmp_path / "whole")
    stopped = tmp_path / "stopped"
    with at_step(7, lambda: signal.raise_signal(signal.SIGTERM)), pytest.raises(Interrupted):
        train(config, stopped)
    assert int(load_file(stopped / "checkpoints/checkpoint-7/average.safetensors")["count"]) > 0
    train(config, stopped, resume=True)
    assert equal(weights(whole), weights(stopped))
    assert lines(whole) == lines(stopped)


def test_what_cannot_be_averaged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"average_last must be in \[0, 1\), got 1"):
        read_recipe({"train": {"average_last": 1.0}})
    with pytest.raises(ValueError, match="average_last needs parallel ddp"):
        read_recipe({"train": {"average_last": 0.1, "parallel": "fsdp2"}})
