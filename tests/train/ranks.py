"""Several processes (gloo) in one test: forked processes that form one group."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable

from accelerate.state import AcceleratorState, PartialState

LIMIT = 120.0  # seconds: far more than they need, less than gloo's own patience


def on_ranks(count: int, act: Callable[[int], object]) -> list[int]:
    """Run `act` in `count` forks that form one process group, with the rank as its argument; return their exit codes.

    A fork that runs longer than `LIMIT` seconds is killed.
    """
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
