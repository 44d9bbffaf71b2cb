"""Several processes (gloo) stop together, and their logs survive a resumption with another number of processes."""

from __future__ import annotations

import shutil
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from skipstone.runs import Run
from train.ranks import on_ranks
from train.tool import MODELS, at_step, lines, recipe, train


def resumed(config: dict[str, Any], folder: Path, rank: int) -> None:
    train(config, folder, resume=True)


@pytest.mark.slow
def test_a_signal_to_one_rank_stops_all_and_what_is_logged_survives(tmp_path: Path) -> None:
    config = recipe(tmp_path, MODELS["topk"], steps=8, save_every=0, log_every=3)
    whole = train(config, tmp_path / "whole")

    def stopped(rank: int) -> None:
        def signal_here() -> None:
            if rank == 1:
                signal.raise_signal(signal.SIGTERM)

        with at_step(5, signal_here):
            train(config, tmp_path / "run")

    assert on_ranks(2, stopped) == [128 + signal.SIGTERM] * 2
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["checkpoint-5"]
    for count in (1, 2, 4):
        folder = tmp_path / f"on-{count}"
        shutil.copytree(tmp_path / "run", folder)
        assert on_ranks(count, partial(resumed, config, folder)) == [0] * count
        for ours, theirs in zip(lines(folder), lines(whole), strict=True):
            assert ours["step"] == theirs["step"]
            for name in {"loss", "token_loss", "oracle_loss"} & theirs.keys():
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4)
        assert Run(folder).result()["tokens"] == Run(whole).result()["tokens"] == 8 * 4 * 32
