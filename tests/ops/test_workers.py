"""Several threads run the parts of one compiled function, and wait for each other without holding up others."""

from __future__ import annotations

import time

import numpy as np
import pytest

pytest.importorskip("numba")

from skipstone.ops import workers
from skipstone.ops.decode_step_native import compiled
from skipstone.ops.magnitude_native import Array, _lying
from skipstone.ops.workers import BARRIER, GIVEN, integers, part_of, parts_of, team, wait

ROUNDS = 200


@compiled
def _told(seen: Array, written: Array, part: int, parts: int, barrier: int, factor: float) -> None:
    """Write a number of each round, wait, and read what all parts have written."""
    arrivals = 0
    for i in range(len(seen)):
        written[i % 2, part] = (i + part) * factor
        arrivals += parts
        wait(barrier, arrivals)
        for other in range(parts):
            seen[i, part] += written[i % 2, other]


@team
def told(packet: int) -> None:
    seen_at, written_at, rounds = integers(packet, 0, 3)
    factor = _lying(packet + GIVEN, (4,), np.float64(0))[3]
    part, parts = part_of(packet), parts_of(packet)
    seen, written = _lying(seen_at, (rounds, 8), np.float64(0)), _lying(written_at, (2, 8), np.float64(0))
    _told(seen, written, part, parts, packet + BARRIER, factor)


@team
def late(packet: int) -> None:
    """The last part arrives at the barrier after some work."""
    out_at, steps = integers(packet, 0, 2)
    part, parts = part_of(packet), parts_of(packet)
    if part == parts - 1:
        x = 1.0
        for _ in range(steps):
            x = x * 0.999 + 1 / (1 + x)
        _lying(out_at, (1,), np.float64(0))[0] = x
    wait(packet + BARRIER, parts)


@pytest.fixture(params=["OpenMP", "Python threads"])
def threads(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "Python threads":
        monkeypatch.setattr(workers, "_forked", True)
    elif workers._openmp()[0] is None:
        pytest.skip("torch has no OpenMP here")


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_every_part_sees_what_all_have_written_before_the_barrier(parts: int) -> None:
    seen, written = np.zeros((ROUNDS, 8)), np.zeros((2, 8))
    workers.share(told, ((seen.ctypes.data, written.ctypes.data, ROUNDS), (0.5,)), parts)
    wanted = [sum((i + part) * 0.5 for part in range(parts)) for i in range(ROUNDS)]
    assert (seen[:, :parts] == np.array(wanted)[:, None]).all()
    assert not seen[:, parts:].any()


@pytest.mark.usefixtures("threads")
def test_who_waits_long_leaves_the_processor() -> None:
    """Spinning would cost as much processor time as the work that is waited for."""
    if not workers.FUTEX:
        pytest.skip("this system has no futexes")
    out = np.zeros(1)

    def seconds(parts: int) -> float:
        start = time.process_time()
        workers.share(late, ((out.ctypes.data, 3_000_000),), parts)
        return time.process_time() - start

    seconds(1), seconds(3)  # starts the threads
    assert min(seconds(3) for _ in range(3)) < 1.5 * max(seconds(1) for _ in range(3))


def test_a_smaller_team_than_asked_for_does_not_wait_for_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP may give fewer threads, inside a parallel region of another library for one."""
    fork, size = workers._openmp()
    if fork is None:
        pytest.skip("torch has no OpenMP here")
    monkeypatch.setattr(workers, "_openmp", lambda: (lambda run, at, parts, flags: fork(run, at, 1, flags), size))
    seen, written = np.zeros((ROUNDS, 8)), np.zeros((2, 8))
    workers.share(told, ((seen.ctypes.data, written.ctypes.data, ROUNDS), (1.0,)), 4)
    assert (seen[:, 0] == np.arange(ROUNDS)).all()
