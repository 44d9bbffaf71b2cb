"""What `damage.py`, `fuzz.py`, `fuzz_coverage.py`, `kills.py` and `troubles.py` share: options, tables, a folder."""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Sequence
from pathlib import Path


def parser_of(page: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the docstring of a script, as it stands; what runs afterwards is offline."""
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)


def markdown(head: Sequence[str], rows: Iterable[Iterable[object]], words: int = 1) -> str:
    """A table whose first columns, `words` of them, hold words and the others numbers."""
    under = ["---"] * words + ["---:"] * (len(head) - words)
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in (head, under, *rows))


def memory() -> str | None:
    """A folder in memory, for many small files; None where there is none."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None
