"""`skipstone adapt` on several processes has the losses of one process, and writes an unsharded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from adapt.sources import mixture, recipe, run
from skipstone.runs import Run
from train.distributed_table import differences, losses
from train.ranks import on_ranks

DISTILLED = {"language_modelling": 0.5, "distillation": 0.5, "hidden_states": 0.1}
MODEL = {"mechanisms": [mixture()], "activation": {"name": "polyglu", "noise": False}}


def wanted(folder: Path, adapt: dict[str, Any], **train: Any) -> dict[str, Any]:
    return recipe(folder, MODEL, {"loss": DISTILLED, **adapt}, log_every=1, device="cpu", compare_every=1, **train)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("train_only", ["all", "routers"])
def test_two_processes_adapt_as_one_does(train_only: str, kind: str, source: Path, tmp_path: Path) -> None:
    adapt = {"stages": [{"steps": 4, "train_only": train_only}], "budget": 0.8}
    one = run(source, wanted(tmp_path, adapt, gradient_accumulation=2), tmp_path / "one")
    two = wanted(tmp_path, adapt, parallel=kind)
    assert on_ranks(2, lambda rank: run(source, two, tmp_path / "two")) == [0, 0]
    # where weights train as well, rounding moves a score of 128 across a threshold in the third step
    assert differences(losses(one)[:2], losses(tmp_path / "two")[:2]) < 1e-5
    assert differences(losses(one), losses(tmp_path / "two")) < (1e-5 if train_only == "routers" else 1e-2)
    ours, theirs = Run(one).result(), Run(tmp_path / "two").result()
    # a threshold lies between two scores, so that rounding may move it past a token
    assert ours["executed_share"] == pytest.approx(theirs["executed_share"], abs=0.01)
    assert Run(tmp_path / "two").load_model().config.mechanisms == Run(one).load_model().config.mechanisms


def test_stages_that_cannot_be_shared_are_one_line(source: Path, tmp_path: Path) -> None:
    differing = {"stages": [{"steps": 1, "train_only": "routers"}, {"steps": 1}]}
    lora = {"stages": [{"steps": 2, "train_only": "routers+lora"}]}
    for adapt, line in ((differing, "need one process"), (lora, "need train.parallel=ddp")):
        with pytest.raises(ValueError, match=line):
            run(source, wanted(tmp_path, adapt, parallel="fsdp2"), tmp_path / "run")
