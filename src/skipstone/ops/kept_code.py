"""Where numba keeps compiled functions on disk: never stale, and damaged or missing files only cost time.

Numba by itself takes a stored function for stale only if the file that defines it has changed, though its code contains
what the function calls or reads from other files; it raises an error for a damaged file, and where there is no folder
to write to.
"""

from __future__ import annotations

import hashlib
import pickle
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

from numba import njit
from numba.core.caching import FunctionCache, IndexDataCacheFile

# The files of this folder that compiled functions consist of, or read constants from.
SOURCES = ("*_native.py", "*_dot.py", "decode_*.py", "int*.py", "neuron_sums.py", "workers.py", "kept_code.py")


class CheckedFile(IndexDataCacheFile):  # type: ignore[misc]
    """Numba's files on disk of one compiled function, with a checksum, so that damaged code is never run."""

    def _save_data(self, name: str, data: Any) -> None:
        body = self._dump(data)
        super()._save_data(name, (hashlib.sha256(body).digest(), body))

    def _load_data(self, name: str) -> Any:
        digest, body = super()._load_data(name)
        if hashlib.sha256(body).digest() != digest:
            raise ValueError(f"{name!r} is damaged")
        return pickle.loads(body)  # noqa: S301 - as numba does, with its own file


class KeptCode(FunctionCache):  # type: ignore[misc]
    """The compiled code that numba keeps of one function, valid until a source file listed in `SOURCES` changes.

    function: the Python function. Raises RuntimeError if there is no folder that can be written to.
    """

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        stamp = (self._impl.locator.get_source_stamp(), sources())
        self._cache_file = CheckedFile(self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Return the compiled function, or None if it is not there or cannot be read.

        sig: numba's types of the arguments. target_context: numba's description of the machine for which it compiles.
        """
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # any bytes may have been there instead of a pickle, and raise anything
            with suppress(OSError):
                self.flush()
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep a compiled function on disk; if that is impossible, the next process compiles it again.

        sig: numba's types of the arguments. data: what numba has compiled for them.
        """
        with suppress(Exception):  # a full disk, or damage that cannot be removed
            super().save_overload(sig, data)


def keep(compiled: Any, function: Any) -> Any:
    """Make numba keep the code of a function on disk, if there is a folder for it, and return `compiled`.

    compiled: numba's object for `function` (what `njit` returns), which has not compiled anything yet. function: the
    Python function.
    """
    with suppress(RuntimeError):  # no folder can be written to
        compiled._cache = KeptCode(function)
    return compiled


def kept_njit(**options: Any) -> Any:
    """Return numba's decorator `njit` with these options; what it compiles is kept on disk where possible.

    options: the keyword arguments of `njit`.
    """
    compile_ = njit(**options)
    return lambda function: keep(compile_(function), function)


@contextmanager
def interrupted_later() -> Iterator[None]:
    """Call the handler of SIGINT only after the `with` block, if the signal arrives within it.

    LLVM calls back into Python while it compiles, and an exception that is raised there is printed and lost: control-C
    would show a traceback and stop nothing. Other threads than the main one are never interrupted.
    """
    before, arrived = signal.getsignal(signal.SIGINT), list[Any]()
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return
    signal.signal(signal.SIGINT, lambda *given: arrived.append(given))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if arrived:
            before(*arrived[0])


@cache
def sources() -> str:
    """Return a checksum of the source files that compiled functions consist of (`SOURCES`)."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in SOURCES for path in Path(__file__).parent.glob(pattern)}):
        total.update(path.read_bytes())
    return total.hexdigest()
