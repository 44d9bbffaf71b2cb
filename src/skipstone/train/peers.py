"""Ends this process of a training soon after another has failed, with a message that points to the other's error."""

from __future__ import annotations

import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import torch.distributed as dist

GRACE = 5.0  # seconds that a process has after another has ended
PATIENCE = 3.0  # seconds that an error of the connection waits, so that the error which caused it is told first
LOST = ("gloo/transport", "NCCL", "ncclRemoteError", "Connection closed by peer", "Connection reset by peer")


class PeerLostError(ConnectionError):
    """The error raised if another process of this training has ended before its last step."""


@contextmanager
def together() -> Iterator[None]:
    """Watch the other processes of a training during a `with` block, which all enter and leave at the same step.

    If another process ends inside the block, this one ends, too: with `PeerLostError` if the connection breaks, or by
    `os._exit` after 5 seconds (`GRACE`) if it is still waiting for the other process, as happens with NCCL. Only
    processes on this machine are watched, and only on Linux; a launcher such as torchrun ends those on other machines.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        yield
        return
    with _watched(_others()):
        try:
            yield
            dist.barrier()  # nobody leaves, and ends, while another is still inside
        except RuntimeError as error:
            if not any(word in f"{type(error).__name__} {error}" for word in LOST):
                raise
            time.sleep(PATIENCE)
            raise PeerLostError(
                f"process {dist.get_rank()} of {dist.get_world_size()} stops because another has ended; the output "
                "of that process tells the cause"
            ) from error


def _others() -> list[int]:
    """Return a file descriptor for every other process of this training that runs on this machine (Linux)."""
    if not hasattr(os, "pidfd_open"):
        return []
    found: list[tuple[str, int] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (_machine(), os.getpid()))
    descriptors = []
    for there in found:
        if there is not None and there[0] == _machine() and there[1] != os.getpid():
            with suppress(OSError):  # not allowed in this container, or ended already, which the next step will find
                descriptors.append(os.pidfd_open(there[1]))
    return descriptors


def _machine() -> str:
    """Return a string that is equal in processes that can see each other's process ids: host name and PID namespace."""
    namespace = Path("/proc/self/ns/pid")
    return f"{socket.gethostname()} {namespace.readlink() if namespace.exists() else ''}"


@contextmanager
def _watched(others: list[int]) -> Iterator[None]:
    """End this process `GRACE` seconds after one of `others` has ended, unless it leaves the `with` block before.

    others: a file descriptor for each of the other processes, closed at the end.
    """
    left, leave = os.pipe()
    thread = threading.Thread(target=_watch, args=(others, left), daemon=True)
    thread.start()
    try:
        yield
    finally:
        os.write(leave, b".")  # closing it would not do while a fork of this process holds it, too
        thread.join()
        for descriptor in (*others, left, leave):
            os.close(descriptor)


def _watch(others: list[int], left: int) -> None:
    poll = select.poll()
    for descriptor in (*others, left):
        poll.register(descriptor, select.POLLIN)
    if left in [descriptor for descriptor, _ in poll.poll()]:
        return
    leaving = select.poll()
    leaving.register(left, select.POLLIN)
    if not leaving.poll(GRACE * 1e3):
        line = f"another process of this training has ended, and this one still waits after {GRACE:g} s: it stops"
        print(f"skipstone: {line}", file=sys.stderr, flush=True)  # noqa: T201
        os._exit(1)
