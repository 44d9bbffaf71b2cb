"""Several processes (gloo) stop together, and their logs survive a resumption with another number of processes."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState

from skipstone.runs import Run
from train.tool import MODELS, at_step, lines, recipe, train

LIMIT = 120.0  # seconds: far more than they need, less than gloo's own patience


def on_ranks(count: int, act: Callable[[int], object]) -> list[int]:
    """Run `act` in so many forks that know of each other; their exit codes. None may outlive the limit."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            _rank(rank, count, port, act)
        children.append(child)
    deadline, codes = time.monotonic() + LIMIT, []
    for child in children:
        while not (done := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < deadline:
            time.sleep(0.05)
        if not done[0]:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
        codes.append(os.waitstatus_to_exitcode(done[1]))
    return codes


def _rank(rank: int, count: int, port: int, act: Callable[[int], object]) -> None:
    code = 1
    try:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
        os.environ |= {name: str(value) for name, value in place.items()} | {"WORLD_SIZE": str(count)}
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        act(rank)
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


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
