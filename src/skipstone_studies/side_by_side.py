"""Run several arms (compared recipes) of a study at a time, each in a process of its own.

This is for a GPU that one small model does not keep busy.

The processes time nothing. Measurements that compare arms, such as speeds, are taken by the parent process when all
have ended.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from skipstone_studies.catalogue import STUDIES
from skipstone_studies.pace import duration
from skipstone_studies.session import Session

COMMAND = [sys.executable, "-m", "skipstone_studies.side_by_side"]  # of one arm
POLL = 0.5  # seconds between looks at the processes
STOPPING = 120.0  # seconds that a stopped process has for its checkpoint
LAST_WORDS = 300  # characters of a process's output that are kept


@dataclass(kw_only=True)
class Worker:
    """A process that runs one arm (compared recipe) of a study with one seed.

    arm, seed: the arm that it runs, and the seed. process: the process. log: the file of its output. began: its start
    on the clock of `time.perf_counter`, in seconds.
    """

    arm: str
    seed: int
    process: subprocess.Popen[bytes]
    log: Path
    began: float


def run(session: Session, seeds: Sequence[int], jobs: int) -> None:
    """Run the recipes (arms) that have no stored result, `jobs` at a time, each in its own process, then compare them.

    session: the study at one scale, which notes failures. seeds: the seeds to run. Raises ValueError for a study of
    timings, whose arms must run alone.
    """
    if session.study.clock is not None:
        raise ValueError(f"study {session.study.name!r} is a timing: its arms run alone, so jobs must be 1, got {jobs}")
    wanted = list(session.arms) if session.only is None else list(session.only)
    left = [(arm, seed) for seed in seeds for arm in wanted if session.recorded(arm, seed) is None]
    session.say(f"{len(left)} runs to do, {jobs} at a time")
    running: list[Worker] = []
    with _stopped_with_us(running):
        while left or running:
            while left and len(running) < jobs:
                running.append(_start(session, *left.pop(0), jobs))
            for worker in [one for one in running if one.process.poll() is not None]:
                running.remove(worker)
                _note(session, worker)
            time.sleep(POLL)
    for seed in seeds:
        session.measure_together(seed)


def _start(session: Session, arm: str, seed: int, jobs: int) -> Worker:
    """Start the process of one arm; its output goes to a file beside the run folder."""
    given = {
        "name": session.study.name,
        "scale": session.scale,
        "corpus": next(iter(session.arms.values())).get("data", {}).get("corpus") if session.study.corpora else None,
        "arm": arm,
        "seed": seed,
        "runs": str(session.runs),
        "out": str(session.out),
        "jobs": jobs,
    }
    log = session.folder(arm, seed).with_name(f"{arm}-seed{seed}.log")
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    with log.open("ab") as output:
        process = subprocess.Popen(
            [*COMMAND, json.dumps(given)],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env={"OMP_NUM_THREADS": threads, **os.environ},
        )
    session.say(f"[bold]{arm}[/bold], seed {seed}: started; its output is in {log}")
    return Worker(arm=arm, seed=seed, process=process, log=log, began=time.perf_counter())


def _note(session: Session, worker: Worker) -> None:
    """Print how a worker's process ended, and add a failure to the session's list."""
    spent = duration(time.perf_counter() - worker.began)
    name = f"[bold]{worker.arm}[/bold], seed {worker.seed}"
    if session.recorded(worker.arm, worker.seed) is not None:
        session.say(f"{name}: recorded after {spent}")
        return
    words = worker.log.read_text(encoding="utf-8", errors="replace").split("\n")
    last = next((line.strip() for line in reversed(words) if line.strip()), "no output")[:LAST_WORDS]
    session.failures.append(f"{session.study.name}, arm {worker.arm!r}, seed {worker.seed}: {last}")
    session.console.print(session.failures[-1], style="red", markup=False, highlight=False, soft_wrap=True)


@contextmanager
def _stopped_with_us(running: Sequence[Worker]) -> Iterator[None]:
    """Stop the worker processes when this one is stopped, and wait until they have saved their checkpoints."""

    def stop(number: int, frame: object) -> None:
        raise SystemExit(128 + number)

    before: Callable[..., object] | int | None = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        for worker in running:
            worker.process.terminate()
        for worker in running:
            try:
                worker.process.wait(STOPPING)
            except subprocess.TimeoutExpired:
                worker.process.kill()
        signal.signal(signal.SIGTERM, before)


def main(given: dict[str, object]) -> int:
    """Run one recipe (arm) of a study with one seed, and store its result; this is the entry point of a worker process.

    given: a dict with the keys name (of the study), scale, corpus (or None), arm, seed, runs (parent folder of the run
    folders), out (parent folder of the stored results) and jobs (number of arms that run at a time). Returns the exit
    status: 0, or 1 if the arm failed or another process runs it.
    """
    study, scale, arm = STUDIES[str(given["name"])], str(given["scale"]), str(given["arm"])
    corpus = None if given["corpus"] is None else str(given["corpus"])
    session = Session(
        study=study,
        scale=scale,
        arms=study.recipes(scale, corpus),
        only=[arm],
        runs=Path(str(given["runs"])),
        out=Path(str(given["out"])),
        console=Console(stderr=True),
        jobs=int(str(given["jobs"])),
    )
    session.run_arms([int(str(given["seed"]))])
    return 1 if session.failures or session.busy else 0


if __name__ == "__main__":
    sys.exit(main(json.loads(sys.argv[1])))
