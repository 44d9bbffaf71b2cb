"""`LogWindow`: sums of losses and time since the last log line. A checkpoint restores them exactly."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from skipstone.core.plain_text import parse_json
from skipstone.core.strict import PlainDict

FILE = "window.json"
STATE: dict[str, type] = {"began": int, "tokens": int, "total_tokens": int, "seconds": float, "total_seconds": float}
SKIPPED = ("skipped", "total_skipped")  # absent in checkpoints of earlier releases


class LogWindow:
    """Sums for the next log line, kept on the device so that adding to them never makes the host wait.

    began: the step after which this window began. sums: token loss and auxiliary loss of this process; tokens: of all
    processes. skipped: steps of this window that were left out, because their numbers were not finite. Totals run over
    the whole training. Time of evaluation and saving is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)  # token loss, auxiliary loss
        self.began = self.tokens = self.total_tokens = 0
        self.skipped = self.total_skipped = 0
        self.seconds = self.total_seconds = 0.0
        self._before = (self.sums.clone(), 0, 0)
        self._since: float | None = None

    def add(self, token_loss: Tensor, auxiliary_loss: Tensor, tokens: int) -> None:
        """Add one micro-batch: its share of the step's mean losses, and its number of tokens."""
        self.sums += torch.stack((token_loss.detach(), auxiliary_loss.detach())).to(self.sums)
        self.tokens += tokens
        self.total_tokens += tokens

    def begin_step(self) -> None:
        """Remember the sums before the micro-batches of a step, for `skip_step`."""
        self._before = (self.sums.clone(), self.tokens, self.total_tokens)

    def skip_step(self) -> None:
        """Take the present step out of the sums again."""
        sums, self.tokens, self.total_tokens = self._before
        self.sums.copy_(sums)
        self.skipped += 1
        self.total_skipped += 1

    def only_skipped(self, step: int) -> bool:
        """Return whether all steps of this window up to `step` were skipped."""
        return 0 < self.skipped == step - self.began

    def start(self) -> None:
        """Start measuring time."""
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Stop measuring time during a `with` block.

        The caller has synchronised the device before.
        """
        if self._since is not None:
            elapsed = time.perf_counter() - self._since
            self.seconds += elapsed
            self.total_seconds += elapsed
        self._since = None
        try:
            yield
        finally:
            self.start()

    def clear(self, step: int) -> None:
        """Begin the next window after `step`; the totals stay."""
        self.sums.zero_()
        self.began, self.tokens, self.seconds, self.skipped = step, 0, 0.0, 0

    def save(self, folder: Path, sums: Tensor, lines: int) -> None:
        """Write the state to a checkpoint. sums: over all processes. lines: number of lines in metrics.jsonl."""
        state = {name: getattr(self, name) for name in (*STATE, *SKIPPED)}
        state |= {"sums": sums.tolist(), "lines": lines}
        (folder / FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path, first: bool = True) -> int | None:
        """Restore the state of a checkpoint; return the number of lines in metrics.jsonl at that time, None if unknown.

        first: whether this is the first process, which takes the sums of all. Raises ValueError for a checkpoint that
        was not written by this trainer.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"checkpoint {str(folder)!r} has no {FILE}: it was not written by skipstone train")
        try:
            state: PlainDict = parse_json(path.read_text(encoding="utf-8"))
            sums = torch.tensor([float(value) for value in state["sums"]])
            values = {name: kind(state[name]) for name, kind in STATE.items()}
            values |= {name: int(state.get(name, 0)) for name in SKIPPED}
            self.sums.copy_(sums if first else torch.zeros_like(sums))
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error!r}") from None
        for name, value in values.items():
            setattr(self, name, value)
        lines = state.get("lines")
        return lines if isinstance(lines, int) else None
