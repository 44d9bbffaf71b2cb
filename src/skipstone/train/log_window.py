"""What the next log line reports: losses and time since the last one. It survives a checkpoint bit for bit."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from skipstone.core.strict import PlainDict

FILE = "window.json"
STATE: dict[str, type] = {"began": int, "tokens": int, "total_tokens": int, "seconds": float, "total_seconds": float}


class LogWindow:
    """Sums on the device, so that adding to them never makes the host wait.

    began: the step after which this window began. sums are those of this process, tokens those of all. The
    totals run over the whole training. Time spent on evaluation and
    on saving is left out.
    """

    def __init__(self, device: torch.device) -> None:
        self.sums = torch.zeros(2, device=device)  # token loss, auxiliary loss
        self.began = self.tokens = self.total_tokens = 0
        self.seconds = self.total_seconds = 0.0
        self._since: float | None = None

    def add(self, token_loss: Tensor, auxiliary_loss: Tensor, tokens: int) -> None:
        """One micro-batch: its share of the step's mean losses, and how many tokens it had."""
        self.sums += torch.stack((token_loss.detach(), auxiliary_loss.detach())).to(self.sums)
        self.tokens += tokens
        self.total_tokens += tokens

    def start(self) -> None:
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in here does not count. The caller has waited for the device before it enters."""
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
        self.began, self.tokens, self.seconds = step, 0, 0.0

    def save(self, folder: Path, sums: Tensor, lines: int) -> None:
        """sums: over all processes. lines: of metrics.jsonl so far."""
        state = {name: getattr(self, name) for name in STATE}
        state |= {"sums": sums.tolist(), "lines": lines}
        (folder / FILE).write_text(json.dumps(state), encoding="utf-8")

    def load(self, folder: Path, first: bool = True) -> int | None:
        """Go on with the window of a checkpoint; returns the lines of metrics.jsonl that it knew of, None if untold.

        first: whether this is the first of the processes, which takes the sums of all. Raises ValueError for a
        checkpoint that was not written by this trainer.
        """
        path = folder / FILE
        if not path.is_file():
            raise ValueError(f"checkpoint {str(folder)!r} has no {FILE}: it was not written by skipstone train")
        try:
            state: PlainDict = json.loads(path.read_text(encoding="utf-8"))
            sums = torch.tensor([float(value) for value in state["sums"]])
            values = {name: kind(state[name]) for name, kind in STATE.items()}
            self.sums.copy_(sums if first else torch.zeros_like(sums))
        except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as error:
            raise ValueError(f"{str(path)!r} cannot be read: {error!r}") from None
        for name, value in values.items():
            setattr(self, name, value)
        lines = state.get("lines")
        return lines if isinstance(lines, int) else None
