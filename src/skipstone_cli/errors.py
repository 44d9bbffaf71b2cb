"""Report users' mistakes as one line each on stderr with exit code 2; unexpected errors keep their traceback."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

# The library raises ValueError (or a subclass) for mistakes of users and asserts invariants; what the system refuses
# (absent files, rights, a full or read-only disk, too many open files) is no fault of the program either.
USER_ERRORS = (ValueError, OSError)


_SHOWN_BY_PYTHON = warnings.showwarning
_told: set[str] = set()  # warnings that were shown


class UserError(ValueError):
    """A mistake on the command line that the command itself finds.

    lines: one message for each mistake.
    """

    def __init__(self, *lines: str) -> None:
        self.lines = list(lines)
        super().__init__("; ".join(lines))


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn a user's mistakes inside a `with` block into lines "skipstone: ..." on stderr and exit code 2.

    These are `ValueError` and `OSError`, and memory that is refused. Other errors keep their traceback; if the
    environment has SKIPSTONE_TRACEBACK=1, all do.
    """
    warnings.showwarning = _show
    _told.clear()
    try:
        yield
    except USER_ERRORS as error:
        lines = [f"skipstone: {' '.join(line.split())}" for line in getattr(error, "lines", None) or [describe(error)]]
        _tell_launcher("\n".join(lines))
        if os.environ.get("SKIPSTONE_TRACEBACK") == "1":
            raise
        for line in lines:
            print(line, file=sys.stderr)
        sys.exit(2)
    except Exception as error:
        _tell_launcher(traceback.format_exc())
        if not _no_memory(error) or os.environ.get("SKIPSTONE_TRACEBACK") == "1":
            raise
        print(f"skipstone: not enough memory: {describe(error).partition('. ')[0]}", file=sys.stderr)
        sys.exit(2)


def _no_memory(error: Exception) -> bool:
    """Return whether Python, or an allocator of torch, was refused memory."""
    out_of_memory = {"OutOfMemoryError"} & {kind.__name__ for kind in type(error).__mro__}
    return isinstance(error, MemoryError) or bool(out_of_memory) or "DefaultCPUAllocator: can't" in str(error)


def _tell_launcher(text: str) -> None:
    """Write the error where torchrun looks for it: it ends with the error of the process that failed first."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        with suppress(OSError), Path(path).open("w", encoding="utf-8") as file:
            json.dump({"message": text, "timestamp": int(time.time())}, file)


def usual_warnings() -> None:
    """From now on, show warnings as Python does, instead of in one line on stderr as this command does."""
    warnings.showwarning = _SHOWN_BY_PYTHON


def _show(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Show each of our own warnings once, as one line; those of libraries are for developers and are not shown."""
    text = " ".join(str(message).split())
    if issubclass(category, UserWarning) and f"{os.sep}skipstone" in filename and text not in _told:
        _told.add(text)
        print(f"skipstone: warning: {text}", file=sys.stderr)


def describe(error: Exception) -> str:
    """Return an error's text as one line, without the error number if the operating system raised it."""
    if isinstance(error, OSError) and error.strerror:
        text = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    else:
        text = str(error)
    return " ".join(text.split()) or type(error).__name__
