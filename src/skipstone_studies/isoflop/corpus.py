"""How much text an isoFLOP experiment has, and that no run reads any of it twice."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from skipstone.data.corpora import find_entry
from skipstone.data.prepare import DataConfig, PreparedData, prepare
from skipstone_studies.isoflop.grid import Cell, Grid


@dataclass(frozen=True, kw_only=True)
class Facts:
    """vocab_size: None where the corpus was not read. tokens: of the training split; None: without end or unknown.

    sha256: of the training split's token ids. data: its rows; None where it was not read. trouble: why
    it was not, "" if it was.
    """

    vocab_size: int | None = None
    tokens: int | None = None
    sha256: str | None = None
    data: PreparedData | None = None
    trouble: str = ""

    def to_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "sha256": self.sha256}


def look(config: DataConfig) -> Facts:
    """Read the corpus. Raises ValueError or FileNotFoundError, one line, when it cannot be had."""
    data = prepare(config)
    ids: Any = getattr(data.train, "ids", None)
    return Facts(
        vocab_size=data.vocab_size,
        tokens=None if ids is None else len(ids),
        sha256=None if ids is None else hashlib.sha256(ids.tobytes()).hexdigest(),
        data=data,
    )


def look_if_cheap(config: DataConfig) -> Facts:
    """For an estimate: as `look`, but a dataset of the hub is not loaded, and a corpus that is absent is no error."""
    if config.corpus.startswith("hf:") or find_entry(config.corpus)[0].kind == "synthetic":
        return Facts(trouble=f"corpus {config.corpus} was not read")
    try:
        return look(config)
    except FileNotFoundError as error:
        return Facts(trouble=str(error))


def share(grid: Grid, cell: Cell, facts: Facts) -> float | None:
    """How often a run reads the corpus; None where it has no end, or is not known."""
    return None if facts.tokens is None else cell.steps * tokens_per_step(grid) / facts.tokens


def tokens_per_step(grid: Grid) -> int:
    return grid.base.train.batch_size * grid.base.data.context


def check_once(grid: Grid, facts: Facts) -> None:
    """Raise ValueError if a run would read text twice and the spec does not allow it."""
    if not grid.once or facts.tokens is None:
        return
    greedy = max(grid.everything(), key=lambda cell: cell.steps)
    rows, there = greedy.steps * grid.base.train.batch_size, facts.tokens // grid.base.data.context
    if rows > there:
        raise ValueError(
            f"{greedy.arm} {greedy.size} at budget {greedy.budget:.3g} reads {rows:,} rows of {grid.base.data.context} "
            f"tokens, and {grid.base.data.corpus} has {there:,}: it would see text {rows / there:.1f} times; take a "
            "larger corpus, smaller budgets or larger sizes, or allow it (--allow-repeats)"
        )
