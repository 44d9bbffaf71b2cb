"""What benchmarks share: ratios taken in turns, and a record from which its page is rendered."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from skipstone.train.environment import describe


def ratios_in_turns(ours: Callable[[], None], theirs: Callable[[], None], rounds: int) -> list[float]:
    """Our seconds by theirs, once a round, in alternating order; a first round, which warms up, is thrown away."""
    ratios = []
    for turn in range(rounds + 1):
        taken = {}
        for run in (ours, theirs) if turn % 2 else (theirs, ours):
            start = time.perf_counter()
            run()
            taken[run] = time.perf_counter() - start
        ratios.append(taken[ours] / taken[theirs])
    return ratios[1:]


def middle(ratios: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def surroundings(seed: int = 0) -> dict[str, Any]:
    """Versions, machine and commit; not the command as typed, which may name folders of the machine."""
    return {name: value for name, value in describe(seed).items() if name != "command"}


def closing(command: str, environment: dict[str, Any]) -> str:
    """The last line of a page: how it was made, and on what."""
    machine, commit = environment["machine"], (environment["git_commit"] or "unknown")[:9]
    dirty = " with changes" if environment["git_dirty"] else ""
    return (
        f"`{command}`, commit {commit}{dirty}, torch {environment['torch']}, transformers "
        f"{environment['transformers']}, {machine['gpu'] or machine['cpu']}, {machine['threads']} threads."
    )


def keep(out: Path | None, name: str, title: str, figures: dict[str, Any], text: str) -> None:
    """Print the page; with a folder, write `NAME.json` and `NAME.md` into it."""
    print(text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        (out / f"{name}.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
        (out / f"{name}.md").write_text(f"# {title}\n\n{text}", encoding="utf-8")
