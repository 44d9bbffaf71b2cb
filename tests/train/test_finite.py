"""Numbers that are not finite stop a training, or are skipped if asked; all processes do the same."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from skipstone.core.routing_module import Placement
from skipstone.measure.router_health import bad_scores
from skipstone.mechanisms import MixtureOfDepths
from skipstone.train.finite import FiniteGuard, NotFinite, RowTurns
from skipstone.train.trainer import RunTrainer
from train.ranks import on_ranks
from train.tool import DENSE, MODELS, lines, mod, recipe, train, weights

MOD = {**DENSE, "mechanisms": [mod("ema_threshold")]}


@contextmanager
def spoilt(what: str, *steps: int, rank: int = 0) -> Iterator[None]:
    """Make a number of these steps NaN, in the process `rank`: the loss, the gradient, or the scores of a router."""
    before = RunTrainer.objective

    def objective(self: Any, loss: Tensor, outputs: Any, inputs: Any, items: Any) -> Tensor:
        loss = before(self, loss, outputs, inputs, items)
        if self.state.global_step + 1 in steps and self.accelerator.process_index == rank:
            if what == "loss":
                return loss * math.inf
            if what == "gradient":
                loss.register_hook(lambda gradient: gradient * math.nan)
            else:
                record = outputs["records"][1]["mixture_of_depths"]
                score_BT = record.score_BT.detach().clone()
                score_BT[0, 3] = math.nan
                outputs["records"][1]["mixture_of_depths"] = record._replace(score_BT=score_BT)
        return loss

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunTrainer, "objective", objective)
        yield


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("loss", "the loss and the gradient are not finite on training rows 28 to 31"),
        pytest.param("gradient", "the gradient is not finite on training rows 28 to 31", marks=pytest.mark.slow),
        ("router", "the router scores of block 1 mixture_of_depths are not finite on training rows 28 to 31"),
    ],
)
def test_a_run_stops_and_names_step_rows_and_checkpoint(what: str, said: str, tmp_path: Path) -> None:
    config = recipe(tmp_path, MOD, steps=9, save_every=3, eval_every=0, eval_rows=2)
    with spoilt(what, 8), pytest.raises(NotFinite) as caught:
        train(config, tmp_path / "run")
    line = str(caught.value)
    assert line.startswith(f"training stopped at step 8: {said}; the last good checkpoint is ")
    assert "checkpoint-6'" in line
    assert "train.max_skipped_steps above 0" in line
    assert "\n" not in line
    if what == "router":  # the same command goes on with what the line advises
        config["train"]["max_skipped_steps"] = 1
        with spoilt(what, 8):
            train(config, tmp_path / "run", resume=True)
        assert json.loads((tmp_path / "run" / "result.json").read_text())["skipped_steps"] == 1


def test_a_bounded_number_of_steps_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = recipe(tmp_path, MOD, steps=8, log_every=2, save_every=4, eval_every=0, eval_rows=2, max_skipped_steps=2)
    with spoilt("loss", 4, 5):
        run = train(config, tmp_path / "run")
    assert "step 4 is skipped (1 of at most 2): the loss" in capsys.readouterr().err
    logged = lines(run, "train")
    assert [line["step"] for line in logged] == [1, 2, 4, 6, 8]
    assert [line.get("skipped_steps") for line in logged] == [None, None, 1, 1, None]
    assert all(math.isfinite(line["loss"]) for line in logged)
    result = json.loads((run / "result.json").read_text())
    assert (result["skipped_steps"], result["tokens"]) == (2, 6 * 4 * 32)
    assert all(value.isfinite().all() for value in weights(run).values())
    with spoilt("loss", 4, 5, 7), pytest.raises(NotFinite, match=r"step 7: .*checkpoint-4.*skipped before: 2"):
        train(config, tmp_path / "again")
    with spoilt("loss", 7), pytest.raises(NotFinite, match="skipped before: 1"):
        train({**config, "train": {**config["train"], "max_skipped_steps": 1}}, tmp_path / "again", resume=True)


def test_a_skipped_step_moves_nothing(tmp_path: Path) -> None:
    """Weights and thresholds after a last step that is skipped are those of the checkpoint before it."""
    config = recipe(tmp_path, MOD, steps=4, save_every=3, eval_every=0, eval_rows=2, max_skipped_steps=1)
    with spoilt("router", 4):
        run = train(config, tmp_path / "run")
    from safetensors.torch import load_file

    before = load_file(run / "checkpoints" / "checkpoint-3" / "model.safetensors")
    moved = [name for name, value in weights(run).items() if not torch.equal(value, before[name])]
    assert moved == []


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
def test_all_processes_stop_together(kind: str, tmp_path: Path) -> None:
    """The number is bad in the second of two processes only; a router's score, which spoils no gradient of others."""
    config = recipe(tmp_path, MOD, steps=4, save_every=2, eval_every=0, eval_rows=2, device="cpu", parallel=kind)

    def act(rank: int) -> None:
        with spoilt("router", 3, rank=1):
            try:
                train(config, tmp_path / "run")
            except NotFinite as error:
                (tmp_path / f"said-{rank}").write_text(str(error))

    assert on_ranks(2, act) == [0, 0]
    said = [(tmp_path / f"said-{rank}").read_text() for rank in (0, 1)]
    assert said[0] == said[1]
    assert "step 3: the router scores of block 1 mixture_of_depths are not finite on training rows 10 to 11" in said[0]
    assert "checkpoint-2'" in said[0]


def test_rows_of_parts_and_processes() -> None:
    turns = RowTurns(rows=2, parts=3, rank=0, count=2)
    assert [turns.first(2, part, rank) for part in range(3) for rank in range(2)] == [12, 14, 16, 18, 20, 22]
    guard = FiniteGuard([], RowTurns(rows=2, parts=2), Path("none"), 0, lambda flags: flags)
    for loss in (0.0, math.nan):
        guard.add(5, torch.tensor(loss), [])
    guard.add_gradient(1.0)
    with pytest.raises(NotFinite, match=r"step 5: the loss is not finite on training rows 18 to 19; there is no check"):
        guard.settle()


def test_scores_of_tokens_that_a_router_never_saw_do_not_count() -> None:
    mechanism = MixtureOfDepths(8, Placement(name="mod"))
    record = mechanism.empty_record(torch.zeros(2, 4, 8))
    assert not bad_scores([{"mod": record}])["block 0 mod"]
    seen = record._replace(reached_BT=torch.ones(2, 4, dtype=torch.bool))
    assert bad_scores([{}, {"mod": seen}])["block 1 mod"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MODELS))
def test_no_family_has_such_numbers_by_itself(name: str, tmp_path: Path) -> None:
    train(recipe(tmp_path, MODELS[name], steps=4, eval_every=0, save_every=0), tmp_path / "run")
