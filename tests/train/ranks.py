"""Several processes (gloo) in one test: forked processes that form one group."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable
from functools import partial

from accelerate.state import AcceleratorState, PartialState

from forks import awaited, fork

LIMIT = 120.0  # seconds: far more than they need, less than gloo's own patience


def on_ranks(count: int, act: Callable[[int], object]) -> list[int]:
    """Run `act` in `count` forks that form one process group, with the rank as its argument; return their exit codes.

    A fork that runs longer than `LIMIT` seconds is killed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [fork(partial(_rank, rank, count, port, act)) for rank in range(count)]
    deadline = time.monotonic() + LIMIT
    return [awaited(child, max(0.0, deadline - time.monotonic())) for child in children]


def _rank(rank: int, count: int, port: int, act: Callable[[int], object]) -> None:
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank}
    os.environ |= {name: str(value) for name, value in place.items()} | {"WORLD_SIZE": str(count)}
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    act(rank)
