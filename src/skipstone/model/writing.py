"""Output that appears when it is complete, and never in the place of something."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def complete(out: Path) -> Iterator[Path]:
    """The path of a folder or file to write, which becomes `out` when the block ends without an error.

    Raises FileExistsError if `out` is a file, or a folder with something in it.
    """
    if out.is_symlink() or out.is_file() or (out.is_dir() and any(out.iterdir())):
        raise FileExistsError(f"output {str(out)!r} exists already; nothing is overwritten")
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        yield partial
        partial.replace(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        if partial.is_file():
            partial.unlink()
