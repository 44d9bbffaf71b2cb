"""Forks that do a part of a test: how they are begun, how they end, and how one that hangs is ended."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def fork(act: Callable[[], object], log: Path | None = None) -> int:
    """Run `act` in a fork and return its process id.

    Its exit code is 0, that of a SystemExit, 130 after a KeyboardInterrupt, or 1 after any other error, whose
    traceback it prints. log: the file that receives its output and its errors.
    """
    if child := os.fork():
        return child
    code = 1
    try:
        if log is not None:
            file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
        act()
        code = 0
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def ended(child: int, seconds: float) -> int | None:
    """The exit code of a fork that ends within so many seconds; None if it is still at work."""
    deadline = time.monotonic() + seconds
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.005)


def awaited(child: int, seconds: float | None = None) -> int:
    """The exit code of a fork, which is killed (-9) if it is still at work after so many seconds."""
    if seconds is not None:
        if (code := ended(child, seconds)) is not None:
            return code
        os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextmanager
def held(child: int) -> Iterator[int]:
    """The process id of a fork, which does not outlive the block."""
    try:
        yield child
    finally:
        with suppress(ChildProcessError):  # it has been awaited within the block
            awaited(child, 0)
