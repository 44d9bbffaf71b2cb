"""Threads that compute the parts of one compiled function together, and the barrier at which they wait for each other.

Numba's own parallel loops cannot be kept on disk, and some of its threading layers abort a process in which two Python
threads use them at once. Here a compiled function is called by several Python threads, each for its part, without the
interpreter's lock.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

SPINS = 1 << 10  # looks at the barrier before the processor is offered to others
I32, I64 = ir.IntType(32), ir.IntType(64)
_lock = threading.Lock()  # one computation at a time: its parts wait for each other, so all must be running
_pools: dict[int, ThreadPoolExecutor] = {}
_counter = np.zeros(8, np.int64)


def _forget() -> None:
    """Drop what a fork has copied: the threads are not there."""
    global _lock
    _lock = threading.Lock()
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def threads() -> int:
    """Return the number of threads that torch may use, at most that of the processors of this process."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), here)


def share(run: Callable[..., None], arguments: tuple[Any, ...], parts: int) -> None:
    """Call run(*arguments, part, parts, barrier) for every part, each in a thread of its own; return after the last.

    run: a compiled function without the interpreter's lock. barrier: an address for `wait`.
    """
    if parts == 1:
        run(*arguments, 0, 1, 0)
        return
    with _lock:
        pool = _pools.setdefault(parts, ThreadPoolExecutor(parts - 1, "skipstone"))
        _counter[0], at = 0, _counter.ctypes.data
        others = [pool.submit(run, *arguments, part, parts, at) for part in range(1, parts)]
        run(*arguments, 0, parts, at)
        for other in others:
            other.result()


@intrinsic
def wait(context, barrier, arrivals):  # type: ignore[no-untyped-def]
    """Arrive at a barrier and wait until there have been so many arrivals; in compiled code only."""

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        place = builder.inttoptr(given[0], I64.as_pointer())
        builder.atomic_rmw("add", place, I64(1), "seq_cst")
        spins = cgutils.alloca_once_value(builder, I64(0))
        look, rest, done = (builder.append_basic_block(name) for name in ("look", "rest", "done"))
        builder.branch(look)
        builder.position_at_end(look)
        builder.cbranch(builder.icmp_signed(">=", builder.load_atomic(place, "acquire", 8), given[1]), done, rest)
        builder.position_at_end(rest)
        count = builder.add(builder.load(spins), I64(1))
        builder.store(count, spins)
        if sys.platform != "win32":
            with builder.if_then(builder.icmp_signed("==", builder.urem(count, I64(SPINS)), I64(0))):
                kind = ir.FunctionType(I32, [])
                builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
        builder.branch(look)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate
