"""Threads that compute the parts of one compiled function together, and the barrier at which they wait for each other.

They are the threads of the OpenMP library that torch has loaded, where it can be called: between two parallel
operations these spin for milliseconds, and threads of another pool, such as numba's, would have to share the processors
with them. Elsewhere Python threads without the interpreter's lock take their place. Numba's own parallel loops cannot
be kept on disk either, and some of its threading layers abort a process in which two Python threads use them at once.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.ccallback import CFunc
from numba.extending import intrinsic

from skipstone.ops.kept_code import interrupted_later, keep

FAST = {"reassoc", "contract", "nsz"}  # sums may be reordered, but NaN and infinities are respected
OPTIONS = {"error_model": "numpy", "fastmath": FAST}
LINE = 64  # bytes of a line of the processor's caches
SPINS = 1 << 9  # looks at a barrier, some tens of microseconds, before the processor is offered to others
# A packet, from its start in bytes: the next part, the number of parts, a function that tells how many threads there
# are (0: as many as parts), arrivals at the barrier, who sleeps there, and the arguments.
NEXT, PARTS, TEAM, BARRIER, SLEEPERS, GIVEN = 0, 8, 16, 64, 128, 192
I32, I64 = ir.IntType(32), ir.IntType(64)
YIELD = ("llvm.aarch64.hint", [I32(1)])  # numba cannot compile the instructions as such
PAUSES = {machine: ("llvm.x86.sse2.pause", []) for machine in ("x86_64", "AMD64")} | {"aarch64": YIELD, "arm64": YIELD}
FUTEX = {"x86_64": 202, "aarch64": 98} if sys.platform == "linux" else {}  # numbers of the system call
SLEEP, WAKE = 128, 129  # FUTEX_WAIT and FUTEX_WAKE, both private to the process
_lock = threading.Lock()  # one computation of Python threads at a time: its parts wait for each other
_pools: dict[int, ThreadPoolExecutor] = {}
_forked = False


def _forget() -> None:
    """Forget the threads of the parent process after a fork, which copies none of them."""
    global _lock, _forked
    _lock, _forked = threading.Lock(), True
    _pools.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def threads() -> int:
    """Return the number of threads to compute with: torch's, but at most the number of processors of this process."""
    here = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(torch.get_num_threads(), here)


class Unit:
    """A function of integers that numba compiles separately, when its address is first asked for, and keeps on disk.

    function: takes int64 arguments alone and returns nothing. count: number of its arguments. Other compiled functions
    call a unit by its address (`call`), so that its code is compiled once, not again within each of them, and only
    where it is used.
    """

    def __init__(self, function: Callable[..., None], count: int) -> None:
        self.function, self.count = function, count
        self.__doc__ = function.__doc__

    @cached_property
    def compiled(self) -> Any:
        """The compiled function, as numba's object for C callbacks; it is compiled, or read from disk, on first use."""
        kind = types.void(*[types.int64] * self.count)
        made = keep(CFunc(self.function, (kind.args, kind.return_type), {}, OPTIONS), self.function)
        with interrupted_later():
            made.compile()
        return made

    @property
    def address(self) -> int:
        """The address of this unit's compiled function, by which others call it; valid as long as the unit lives."""
        return int(self.compiled.address)

    @property
    def ctypes(self) -> Any:
        """The function in a form that Python can call, which releases the interpreter's lock."""
        return self.compiled.ctypes


# A function that only compiled functions call: numba makes nothing for Python to call, and keeps no copy on disk.
inner = njit(fastmath=FAST, error_model="numpy", nogil=True, no_cpython_wrapper=True, no_cfunc_wrapper=True)


def unit(count: int) -> Callable[[Callable[..., None]], Unit]:
    """Return a decorator that makes a function a `Unit`, which numba compiles separately, to be called by address.

    count: number of the function's arguments, all of them integers.
    """
    return lambda function: Unit(function, count)


def team(function: Callable[[int], None]) -> Unit:
    """Return a `Unit` (separately compiled function) that `share` can run in several threads.

    It is compiled when it is first used. function: takes the address of a packet (its arguments in memory), calls
    `part_of` once for the index of its part, and reads the packet with `parts_of` and `integers`.
    """
    return Unit(function, 1)


def share(run: Any, given: Sequence[Sequence[float]], parts: int) -> None:
    """Run a compiled function in several threads at once, and return when all have finished.

    run: the `Unit` that `team` returned. given: the function's arguments, as tuples of integers (int64) or of floats
    (fp64), which are stored one after the other in a packet; each thread calls the function with the packet's address
    in memory. parts: number of threads; 1 means that only the calling thread runs it.
    """
    numbers = [number for each in given for number in each]
    kinds = "".join(("d" if isinstance(each[0], float) else "q") * len(each) for each in given)
    packet = ctypes.create_string_buffer(GIVEN + 8 * len(numbers) + LINE)
    skipped = -ctypes.addressof(packet) % LINE
    at = ctypes.addressof(packet) + skipped
    fork, size = (None, 0) if parts == 1 or _forked else _openmp()
    struct.pack_into(f"3q{GIVEN - 24}x{kinds}", packet, skipped, 0, parts, size, *numbers)
    if parts == 1:
        run.ctypes(at)
    elif fork is not None:
        fork(run.address, at, parts, 0)
    else:
        with _lock:
            pool = _pools.setdefault(parts, ThreadPoolExecutor(parts - 1, "skipstone"))
            others = [pool.submit(run.ctypes, at) for _ in range(1, parts)]
            run.ctypes(at)
            for other in others:
                other.result()


@cache
def _openmp() -> tuple[Any, int]:
    """Return GOMP_parallel of the OpenMP library that torch is linked to, and the address of its omp_get_num_threads.

    LLVM's and Intel's OpenMP have both, too. Returns None and 0 if there is none.
    """
    for path in sorted(Path(torch.__file__).parent.glob("lib/libtorch_cpu.*")):
        try:
            library = ctypes.CDLL(str(path))
            fork, size = library.GOMP_parallel, ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p).value
        except (AttributeError, OSError):
            continue
        fork.argtypes, fork.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None
        return fork, size or 0
    return None, 0


# The functions below exist in compiled code only.


def _place(builder: ir.IRBuilder, address: ir.Value, offset: int, kind: ir.Type) -> ir.Value:
    return builder.inttoptr(builder.add(address, I64(offset)), kind.as_pointer())


@intrinsic
def part_of(context, packet):  # type: ignore[no-untyped-def]
    """Return the index of the calling thread's part of the work, from 0; for code compiled by numba only.

    Every call counts one part as begun and returns the next, so a thread calls it once. context: supplied by numba, not
    by the caller. packet: the address of the memory that holds the function's arguments, which `share` passes to the
    function.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        return builder.atomic_rmw("add", _place(builder, given[0], NEXT, I64), I64(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def parts_of(context, packet):  # type: ignore[no-untyped-def]
    """Return into how many parts the work is divided, one per thread; OpenMP may start fewer than requested.

    For code compiled by numba only. context: supplied by numba, not by the caller. packet: the address of the memory
    that holds the function's arguments, which `share` passes to the function.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        found = cgutils.alloca_once_value(builder, builder.load(_place(builder, given[0], PARTS, I64)))
        size = builder.load(_place(builder, given[0], TEAM, I64))
        with builder.if_then(builder.icmp_signed("!=", size, I64(0))):
            function = builder.inttoptr(size, ir.FunctionType(I32, []).as_pointer())
            builder.store(builder.sext(builder.call(function, []), I64), found)
        return builder.load(found)

    return types.int64(types.int64), generate


@intrinsic(prefer_literal=True)
def integers(context, packet, first, count):  # type: ignore[no-untyped-def]
    """Return int64 arguments that `share` has stored in a packet, as a tuple; for code compiled by numba only.

    context: supplied by numba, not by the caller. packet: the address of the memory that holds the function's
    arguments, which `share` passes to the function. first, count: index of the first argument and number of arguments,
    constants.
    """
    at, length = first.literal_value, count.literal_value

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        places = [_place(builder, given[0], GIVEN + 8 * (at + i), I64) for i in range(length)]
        return context.make_tuple(builder, signature.return_type, [builder.load(place) for place in places])

    return types.UniTuple(types.int64, length)(types.int64, first, count), generate


@intrinsic
def call(context, address, given):  # type: ignore[no-untyped-def]
    """Call a `Unit` by its address; for code compiled by numba only.

    context: supplied by numba, not by the caller. address: what `Unit.address` returned for the unit. given: the unit's
    arguments, a tuple of int64.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        numbers = cgutils.unpack_tuple(builder, given[1])
        kind = ir.FunctionType(ir.VoidType(), [I64] * len(numbers))
        builder.call(builder.inttoptr(given[0], kind.as_pointer()), numbers)
        return context.get_dummy_value()

    return types.void(types.int64, types.UniTuple(types.int64, len(given))), generate


@intrinsic
def wait(context, barrier, arrivals):  # type: ignore[no-untyped-def]
    """Arrive at a barrier and wait until `arrivals` arrivals have been counted there; for code compiled by numba only.

    context: supplied by numba, not by the caller. barrier: its address, `packet + BARRIER`, where `packet` is the
    address that `share` passes to the function. arrivals: a total since `share` began, because the count is never
    reset: among P threads P at the first wait, 2 P at the second, and so on. Returns nothing; what threads wrote before
    they arrived can be read afterwards. A thread that has waited in vain for a while sleeps, so that another can use
    its processor.
    """

    def generate(context, builder, signature, given):  # type: ignore[no-untyped-def]
        place, sleepers = (_place(builder, given[0], offset, I32) for offset in (0, SLEEPERS - BARRIER))
        wanted, spins = builder.trunc(given[1], I32), cgutils.alloca_once(builder, I32)
        builder.store(I32(0), spins)
        arrived = builder.add(builder.atomic_rmw("add", place, I32(1), "seq_cst"), I32(1))
        last, look, rest, sleep, done = (
            builder.append_basic_block(name) for name in ("last", "look", "rest", "sleep", "done")
        )
        builder.cbranch(builder.icmp_signed(">=", arrived, wanted), last, look)
        builder.position_at_end(last)
        with builder.if_then(builder.icmp_signed(">", builder.load_atomic(sleepers, "seq_cst", 4), I32(0))):
            _system(builder, WAKE, place, I32(2**31 - 1))
        builder.branch(done)
        builder.position_at_end(look)
        here = builder.load_atomic(place, "acquire", 4)
        builder.cbranch(builder.icmp_signed(">=", here, wanted), done, rest)
        builder.position_at_end(rest)
        count = builder.add(builder.load(spins), I32(1))
        builder.store(count, spins)
        if platform.machine() in PAUSES:
            name, options = PAUSES[platform.machine()]
            kind = ir.FunctionType(ir.VoidType(), [option.type for option in options])
            builder.call(cgutils.get_or_insert_function(builder.module, kind, name), options)
        builder.cbranch(builder.icmp_signed("<", count, I32(SPINS)), look, sleep)
        builder.position_at_end(sleep)
        builder.atomic_rmw("add", sleepers, I32(1), "seq_cst")
        here = builder.load_atomic(place, "seq_cst", 4)
        with builder.if_then(builder.icmp_signed("<", here, wanted)):
            _system(builder, SLEEP, place, here)
        builder.atomic_rmw("sub", sleepers, I32(1), "seq_cst")
        builder.branch(look)
        builder.position_at_end(done)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def _system(builder: ir.IRBuilder, operation: int, place: ir.Value, value: ir.Value) -> None:
    """Sleep while the number at `place` has this value, or wake all that sleep there, by a futex of Linux.

    operation: SLEEP or WAKE. Without futexes, SLEEP offers the processor to other threads and WAKE does nothing.
    """
    number = FUTEX.get(platform.machine())
    if number is not None:
        zero = I64(0)
        given = [I64(number), builder.ptrtoint(place, I64), I64(operation), builder.sext(value, I64), zero, zero, zero]
        kind = ir.FunctionType(I64, [I64] * len(given))
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "syscall"), given)
    elif operation == SLEEP and sys.platform != "win32":
        kind = ir.FunctionType(I32, [])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "sched_yield"), [])
