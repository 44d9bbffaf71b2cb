"""A process of several that fails ends the others soon, and its own error is the last that is told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
import yaml

from skipstone.train import peers
from train.ranks import on_ranks
from train.tool import MODELS, at_step, recipe, train

TESTS = Path(__file__).resolve().parents[1]
# Seconds from the failure to the end of the last process; where processes wait for a core, all of them take longer.
LIMIT = 30.0 * max(1.0, os.getloadavg()[0] / (2 * (os.cpu_count() or 1)))


def dies(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("the error of process 1")


@pytest.mark.parametrize("kind", ["ddp", pytest.param("fsdp2", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("fail", "code"), [(raises, 1), pytest.param(dies, -9, marks=pytest.mark.slow)])
def test_the_others_end_soon(
    kind: str,
    fail: Callable[[int], None],
    code: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(peers, "PATIENCE", 0.1)
    wanted = recipe(tmp_path, MODELS["topk"], parallel=kind, steps=6, eval_every=0, save_every=0, device="cpu")

    def act(rank: int) -> None:
        with at_step(2, partial(fail, rank)):
            train(wanted, tmp_path / "run")

    began = time.monotonic()
    assert on_ranks(2, act) == [1, code]
    assert time.monotonic() - began < LIMIT
    assert "process 0 of 2 stops because another has ended" in capfd.readouterr().err


def test_one_that_waits_for_the_failed_one_ends(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """As in NCCL, which tells nobody: here by a sleep that nothing interrupts."""
    monkeypatch.setattr(peers, "GRACE", 0.2)

    def act(rank: int) -> None:
        dist.init_process_group("gloo")
        with peers.together():
            raises(rank)
            time.sleep(60)

    began = time.monotonic()
    assert on_ranks(2, act) == [1, 1]
    assert time.monotonic() - began < LIMIT
    assert "this one still waits after 0.2 s: it stops" in capfd.readouterr().err


def test_processes_that_end_together_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peers, "GRACE", 0.0)

    def act(rank: int) -> None:
        dist.init_process_group("gloo")
        with peers.together():
            time.sleep(0.2 * rank)

    assert on_ranks(2, act) == [0, 0]


def torchrun(folder: Path, how: str, kind: str, **more: Any) -> tuple[int, str, float]:
    """Train until process 1 fails; the exit code, the lines, and the seconds from the failure to the end."""
    wanted = {"steps": 1000, "log_every": 1, "eval_every": 0, "save_every": 2, "device": "cpu", **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(folder, MODELS["topk"], parallel=kind, **wanted)))
    where = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent / "src")]),
    }
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launch, str(TESTS / "train" / "crashing.py"), how, "1", "5"]
    command += ["train", str(folder / "recipe.yaml"), "--out", str(folder / "run")]
    with (folder / "log").open("w") as log:
        running = subprocess.Popen(command, env=where, stdout=log, stderr=log)
        metrics, fifth = folder / "run" / "metrics.jsonl", '"step": 4'
        while running.poll() is None and not (metrics.is_file() and fifth in metrics.read_text()):
            time.sleep(0.05)
        began = time.monotonic()
        running.wait(300)
    return running.returncode, (folder / "log").read_text(), time.monotonic() - began


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
@pytest.mark.parametrize("how", ["raise", "kill", "slow"])
def test_torchrun_ends_with_the_error_of_the_failed_process(how: str, kind: str, tmp_path: Path) -> None:
    code, said, seconds = torchrun(tmp_path, how, kind)
    sys.stdout.write(f"{how} {kind}: {seconds:.1f} s, load {os.getloadavg()[0]:.0f}\n")
    assert code == 1
    assert seconds < LIMIT
    last = said.rpartition("Root Cause")[2]
    assert re.search(r"rank +: 1 ", last), said
    assert (
        "Signal 9 (SIGKILL)" if how == "kill" else "ZeroDivisionError: the error of the process that failed"
    ) in last
    assert "stopping after this step" not in said or how == "slow"
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-4" / "files.json").is_file()
